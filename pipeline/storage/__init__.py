"""Files in local folders and object stores behind one small interface. This folder knows nothing of what files hold."""

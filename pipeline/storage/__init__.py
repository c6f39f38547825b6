"""Files in local folders and object stores behind one small interface. It knows nothing of what they hold."""

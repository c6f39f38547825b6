"""Files in local folders and object stores behind one small interface. This folder must not know what is in a file."""

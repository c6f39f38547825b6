"""Bytes of images, tars and Parquet tables to arrays and back. It knows no folders and no jobs."""

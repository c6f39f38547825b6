"""Reads and writes image files, tars and Parquet tables. This folder must not know storages or jobs."""

"""Data in motion: storage, shards, tables, the commit protocol, and the runner that drives them inline or on Ray."""

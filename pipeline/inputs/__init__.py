"""What a job is given: folders, globs, tars, tables, shards and targets, found and read in a fixed order."""

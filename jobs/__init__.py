"""The `air` command: one file per job with its options and its main(). Thin: parse, plan, call pipeline, print."""

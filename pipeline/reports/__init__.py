"""Looking at results: SQL over targets and encoded files, contact sheets and charts."""

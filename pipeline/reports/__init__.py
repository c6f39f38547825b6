"""Reports on the output of jobs and evaluations: SQL views, contact sheets, charts. Nothing here knows how jobs run."""

"""Reports on the output of jobs and evaluations: SQL views, contact sheets and charts. No job knows its reports."""

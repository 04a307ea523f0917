"""`report.html` of a run: one page, made of the files in the run's folder."""

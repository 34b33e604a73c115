"""The report of an experiment: one page of HTML, and its plots."""

"""The contents of a folder of results, and the verdicts on them."""

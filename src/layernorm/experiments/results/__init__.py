"""What a folder of results holds, and the verdicts on it."""

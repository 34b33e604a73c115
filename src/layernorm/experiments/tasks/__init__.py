"""The tasks that compare norms, a file or folder each."""

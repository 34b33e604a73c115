"""The studies, which compare no norms, a file or folder each."""

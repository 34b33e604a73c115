"""The first minutes on a GPU: what runs, what is right, and what it takes, the most valuable first."""

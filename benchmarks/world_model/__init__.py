"""Updates of a world model's recurrence."""

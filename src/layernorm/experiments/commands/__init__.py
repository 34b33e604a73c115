"""What the commands of the experiments do."""

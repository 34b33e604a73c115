"""Updates of the experiments' networks."""

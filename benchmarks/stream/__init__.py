"""Online inference on CPUs."""

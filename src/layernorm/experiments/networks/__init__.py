"""Networks with each norm of a comparison, which several tasks share."""

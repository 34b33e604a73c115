"""The recurrent layers over a few steps, on CPUs."""

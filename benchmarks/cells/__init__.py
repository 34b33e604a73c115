"""The recurrent cells, called step by step, on CPUs."""

"""The recurrent layers on CPUs."""

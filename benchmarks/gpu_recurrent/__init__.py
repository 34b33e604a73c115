"""The recurrent layers on GPUs."""

"""Before and around a run: will it fit, how fast is it, and many runs at once."""

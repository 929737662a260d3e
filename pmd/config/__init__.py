"""The configuration: its schema, loading from files, and the checks before any weights load."""

"""The configuration: its schema, how files become objects, and what is refused before any weights load."""

"""`search`."""

"""Tables and axes, which know nothing of what they show."""

"""Checks of arguments, with one wording for each kind of mistake: name, rule, and what was given."""

"""Mistakes of the user, told in one line."""

from __future__ import annotations


class CliError(Exception):
    """A mistake of the user or the environment, to be told in one line."""

"""The blocks of a model: replayed, observed, refined."""

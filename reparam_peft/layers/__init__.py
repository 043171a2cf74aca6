"""Layer kinds, and the factorised module of each."""

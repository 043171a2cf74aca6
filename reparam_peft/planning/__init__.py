"""Ranks under a budget, and the plan that holds them."""

"""`HealingTrainer`."""

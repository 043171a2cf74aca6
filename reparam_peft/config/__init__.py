"""`ReparamConfig`, its checks, and the model card that is made of it."""

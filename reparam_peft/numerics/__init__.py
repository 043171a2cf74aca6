"""Functions of tensors and numbers; torch only."""

"""Statistics of inputs and output gradients."""

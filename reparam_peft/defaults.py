"""Defaults that help texts name, too: they are read without PyTorch, which takes seconds to import."""

from __future__ import annotations

KEEP = 0.8  # fraction of the targeted parameters
# What `get_peft_model` and `compress` do where a field of a config is None.
DATA_FREE = {"method": "svd", "allocation": "uniform", "form": "factors"}
CALIBRATED = {"method": "whitened", "allocation": "loss", "form": "pivot"}
WINDOWS, LENGTH = 24, 512  # of text that a model writes itself, in tokens
EPOCHS = 4  # of refinement

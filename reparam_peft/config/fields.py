"""What the fields of a config may be."""

from __future__ import annotations

METHODS = ("svd", "whitened", "autoencoder")
ALLOCATIONS = ("uniform", "loss")
INPUT_METRICS = ("gram", "diagonal", "none")
OUTPUT_METRICS = ("fisher", "diagonal", "none")
CALIBRATED_METHODS = ("whitened", "autoencoder")
# What `get_peft_model` and `compress` do where a field is None.
DATA_FREE = {"method": "svd", "allocation": "uniform", "form": "factors"}
CALIBRATED = {"method": "whitened", "allocation": "loss", "form": "pivot"}

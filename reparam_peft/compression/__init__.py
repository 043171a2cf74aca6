"""`compress`, `plan`, `retruncate`, `compress_checkpoint`."""

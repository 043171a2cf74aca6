"""Plain transformers models with factorised layers: format, loader, reader, ONNX, 8 and 4 bits."""

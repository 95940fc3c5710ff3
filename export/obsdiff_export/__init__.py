"""Components become ONNX graphs and engines; nothing here knows of pruning but the N:M check."""

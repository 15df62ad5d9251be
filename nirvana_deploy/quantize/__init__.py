"""Quantized ONNX folders from float ones: the numbers, the graph that carries them, and the proof."""

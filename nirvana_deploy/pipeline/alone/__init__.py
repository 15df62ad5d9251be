"""Single steps that need no output folder: an ONNX folder, a choice of text, an answer."""

"""From a checkpoint to an ONNX folder that runtimes load."""

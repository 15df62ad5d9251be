"""An ONNX folder opened for rewriting: its linears, their names, its layers as graphs."""

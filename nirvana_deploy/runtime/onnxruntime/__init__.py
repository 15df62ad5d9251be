"""ONNX folders in ONNX Runtime."""

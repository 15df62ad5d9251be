"""Engine files in TensorRT."""

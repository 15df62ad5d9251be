"""TensorRT engines from ONNX folders: built without a GPU where the builder can, run where there is one."""

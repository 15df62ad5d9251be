"""OpenVINO: ONNX folders on Intel's CPUs, GPUs and NPUs."""

"""From a checkpoint to an ONNX folder that runtimes load, verified against the checkpoint."""

MODEL_FILE = "model.onnx"
DATA_FILE = "model.onnx.data"
"""External data of MODEL_FILE, in the same folder."""

"""From a checkpoint to an ONNX folder that runtimes load, verified against the checkpoint."""

MODEL_FILE = "model.onnx"
DATA_FILE = "model.onnx.data"
"""External data of the graphs in the same folder: of MODEL_FILE, or of the two below."""
ENCODER_FILE = "encoder_model.onnx"
DECODER_FILE = "decoder_model_merged.onnx"
"""An encoder-decoder's graphs, named as optimum and transformers.js look for them."""
SCHEMA_KEY, FLAVOR_KEY, DTYPE_KEY = (f"nirvana_deploy.{key}" for key in ("schema", "flavor", "dtype"))
"""What a graph says of itself, in its metadata."""

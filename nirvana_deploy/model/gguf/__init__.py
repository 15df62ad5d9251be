"""GGUF files as models: read once, and kept as folders of safetensors."""

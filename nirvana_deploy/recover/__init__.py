"""Training a pruned checkpoint toward the dense model."""

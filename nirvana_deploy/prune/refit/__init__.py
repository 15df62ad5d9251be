"""What the cut leaves, fitted to the dense model."""

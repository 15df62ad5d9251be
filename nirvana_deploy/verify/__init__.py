"""Two runners agree: logits within a tolerance, and the same greedy tokens."""

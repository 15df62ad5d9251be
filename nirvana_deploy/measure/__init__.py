"""Speed, memory and quality of deployed artifacts."""

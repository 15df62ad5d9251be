"""Zero-shot tasks, by name from the hub or from local files."""

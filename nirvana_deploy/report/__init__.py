"""From records to words and pictures."""

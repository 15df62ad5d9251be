"""Finished output folders side by side."""

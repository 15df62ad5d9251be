"""Scores of units: what removing them is expected to cost."""

"""Rounds of a benchmark: how sure a ratio is, and what the machine did meanwhile."""

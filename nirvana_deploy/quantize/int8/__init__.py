"""W8A8: ranges, smoothing, decisions, Q/DQ."""

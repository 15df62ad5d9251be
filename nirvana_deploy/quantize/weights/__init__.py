"""Weights as codes: rounding, fitting, writing."""

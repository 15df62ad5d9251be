"""Calibrate, score, plan and slice: from a dense model to a structurally smaller one."""

"""Searches and budgets: several cuts of one job, and which of them to take."""

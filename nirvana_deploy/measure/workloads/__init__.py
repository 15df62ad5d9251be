"""Workloads as files, and curves over length, batch and threads."""

"""Errors, files written whole and read back, progress, tables of names, the machine."""

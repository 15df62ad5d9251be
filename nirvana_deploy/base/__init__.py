"""Errors, whole files, progress, tables of names, the machine."""

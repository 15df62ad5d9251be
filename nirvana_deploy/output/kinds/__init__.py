"""What the records of single files hold, beside those of ``record_kinds.py``."""

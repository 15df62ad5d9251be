"""One module a subject; subject.py says what it holds."""

"""Model cards: the README.md of each folder that people publish."""

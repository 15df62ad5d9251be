"""What the documentation site takes from the code and the records while it is built."""

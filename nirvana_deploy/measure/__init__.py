"""Speed, memory and quality of deployed artifacts, and the report that shows them."""

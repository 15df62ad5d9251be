"""What Python shows a person of results and progress: lines in a terminal, tables in a notebook."""

"""What the machine reaches, what a graph asks of it, and where the time goes."""

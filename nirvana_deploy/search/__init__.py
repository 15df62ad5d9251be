"""Many cuts of one model under one budget: points, what they promise, and which one to take."""

"""The model as it is: its shape, its family, where it comes from, how its weights are read."""

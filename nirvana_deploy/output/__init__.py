"""The output folder: its run, its files, its models, its records."""

"""A model run one layer at a time."""

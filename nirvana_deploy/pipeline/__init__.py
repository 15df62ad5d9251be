"""The whole arrow: options -> recipes -> stages in order; and single stages again, on a finished folder."""

"""Several models of any kind timed against each other, in one run and on one machine."""

"""What the machine allows, and where the time goes."""

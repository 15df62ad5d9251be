"""What each layer loses when it keeps less."""

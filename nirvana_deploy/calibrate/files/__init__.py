"""Text files of users: recognized by their first bytes or their suffix, read or named."""

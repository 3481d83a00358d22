"""Where turns come from."""

"""HOW IT IS SEEN: every metric once."""

"""What runs in serving pods."""

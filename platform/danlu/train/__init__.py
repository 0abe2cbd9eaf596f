"""What runs in training pods."""

"""Score a bundle or an endpoint, and report on it."""

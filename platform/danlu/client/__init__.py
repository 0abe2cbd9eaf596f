"""What asks a running service from outside, over HTTP: a chat in the terminal, and a load with its report."""

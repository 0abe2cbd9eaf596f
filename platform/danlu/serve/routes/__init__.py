"""What a replica answers, a file for each kind of engine. The gateway is around them."""

"""Make a bundle smaller; every result comes with its quality delta."""

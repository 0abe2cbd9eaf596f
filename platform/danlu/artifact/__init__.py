"""WHAT TRAVELS: the bundle, and the store that keeps its versions."""

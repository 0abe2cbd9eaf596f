"""One file per engine, the same interface in each."""

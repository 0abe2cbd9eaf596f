"""One file per task, the same functions in the same order in each."""

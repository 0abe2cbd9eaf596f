"""One file per way of spreading a model over workers."""

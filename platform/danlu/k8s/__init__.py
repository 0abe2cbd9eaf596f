"""WHERE it runs: a spec becomes Kubernetes objects (pure), and `client` alone talks to a cluster."""

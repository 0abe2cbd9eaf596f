"""Jobs and services on Kubernetes, over k8s.client."""

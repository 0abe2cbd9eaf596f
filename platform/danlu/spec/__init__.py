"""WHAT is asked for: frozen pydantic, nothing else."""

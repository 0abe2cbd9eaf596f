"""OpenAI's wire types, and vLLM's extras: request bodies in, response bodies out. Pure: stdlib and pydantic."""

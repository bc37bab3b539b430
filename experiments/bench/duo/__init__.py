"""The Duo-LLM benchmark and its oracle."""

"""The decoder language model and its Hugging Face face."""

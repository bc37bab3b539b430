"""How a GPU's memory is divided, and how fast decoding will be: what is known before anything runs."""

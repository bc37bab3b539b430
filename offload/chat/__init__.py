"""A conversation in the terminal, with a model in this process or with any server of the OpenAI interface."""

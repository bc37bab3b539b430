"""The wire formats of the OpenAI and Anthropic interfaces: what requests say, and how answers are written."""

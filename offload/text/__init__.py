"""Tokens to text as they come: pieces without half characters, stop strings, channels of an answer, chat templates."""

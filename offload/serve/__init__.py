"""Generates text with an offloaded model, alone or in batches of prompts."""

"""Generates text with an offloaded model: for one prompt, for many, and for clients over HTTP."""

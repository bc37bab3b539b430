"""Stored forms: how an expert lies in a file and in a slot."""

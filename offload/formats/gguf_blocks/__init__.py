"""Experts in the blocks of a GGUF file: how they lie in slots, and how they become numbers."""

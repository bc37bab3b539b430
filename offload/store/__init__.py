"""Reads experts by threads, past the page cache or through it; writes packed copies."""

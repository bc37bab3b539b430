"""Architectures whose routers read something besides the token: chunks, a condition, a task."""

"""Routers that look experts up in large tables by product or Tucker keys."""

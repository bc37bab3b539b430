"""Routers trained for locality beside ordinary ones: loss, hit rates, reads from the SSD, placement."""

"""`expertier demo`: the whole story on this machine, as one HTML page."""

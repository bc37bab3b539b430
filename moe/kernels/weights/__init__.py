"""How weights are stored and read inside a kernel."""

"""The search for few hops between nodes from layer to layer."""

"""The routed feed-forward layer, and the stack of decoder layers."""

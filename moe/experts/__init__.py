"""Banks of experts in plain torch, and the reference that they are tested against."""

"""Routers with a rule of their own: ReLU, soft, fixed, by modality, pre-gated."""

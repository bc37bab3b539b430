"""What a person sees of a run while it goes on: progress, curves, alerts, a page, TensorBoard files."""

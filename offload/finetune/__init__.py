"""Fine-tunes a model whose experts stay on disk: forward only, by adapters, or all of its parameters."""

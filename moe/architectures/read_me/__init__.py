"""Read-ME: one router over token ids decides every layer's expert ahead."""

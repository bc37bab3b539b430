"""What a long search runs on: time budgets, worker processes, blocks of tokens."""

"""Other gates for a trained mixture of experts, whose experts stay as they are: null experts, pre-gates."""

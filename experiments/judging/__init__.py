"""How good a trained model is, and what a difference between two is worth: domains, tasks, intervals, equivalence."""

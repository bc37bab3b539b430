"""Memory budgets, the cost model of a decode step, huge pages."""

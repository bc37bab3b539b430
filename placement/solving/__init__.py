"""The three questions: solve, re-plan, and tiers of one machine."""

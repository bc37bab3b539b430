"""Score, select, weigh: the classic router and every router that overrides one of its steps."""

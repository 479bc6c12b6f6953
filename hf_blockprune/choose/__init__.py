"""Which parts go under a budget."""

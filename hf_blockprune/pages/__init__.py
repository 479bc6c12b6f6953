"""HTML pages about pruned models."""

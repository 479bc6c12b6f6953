"""HTML pages and pictures about pruned models."""

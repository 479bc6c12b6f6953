"""Pruned models in forms that need nothing of this package."""

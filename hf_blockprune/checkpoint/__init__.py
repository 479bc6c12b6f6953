"""Pruned models as folders, and on the Hub."""

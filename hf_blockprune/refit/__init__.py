"""Survivors of pruning solved for."""

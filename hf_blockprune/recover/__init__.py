"""Survivors learn without labels."""

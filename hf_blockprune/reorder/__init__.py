"""Exact changes of a model's form: features change places, scales fold, unused units leave; its function stays."""

"""What this machine takes: time and energy, measured."""

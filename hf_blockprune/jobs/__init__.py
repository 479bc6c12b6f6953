"""What people start: from a recipe file and overrides to an output folder."""

"""What shapes and masks cost on a device; the formulas travel with checkpoints, see `hub`."""

"""What layers see of calibration images."""

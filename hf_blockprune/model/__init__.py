"""What a vision transformer consists of, and what it answers."""

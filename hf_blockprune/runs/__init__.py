"""The run that is under way: its processes and machine, what is kept of it, and how it ends."""

"""Arguments as they arrive: checks, and bounds in all their forms."""

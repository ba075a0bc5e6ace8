"""Checks of arguments, and bounds in all their forms."""

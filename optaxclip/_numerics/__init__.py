"""Arithmetic that stays within the float range: norms, factors, averages, matrices."""

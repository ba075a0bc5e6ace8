"""Arithmetic that stays within the float range: norms, factors, averages, matrices.

A comment on a workaround names the versions of jax with the defect. The workaround can go when its probe in
tests/compiled/test_workarounds.py fails, which it does with the first jax without the defect.
"""

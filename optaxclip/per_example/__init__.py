"""Gradients of single examples, each transformed by itself before they are added up."""

from optaxclip.per_example.gradients import clipped_value_and_grad, form_of

__all__ = ["clipped_value_and_grad", "form_of"]

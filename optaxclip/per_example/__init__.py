"""Per-example gradients, each clipped by itself before they are added up."""

from optaxclip.per_example.gradients import clipped_value_and_grad, form_of
from optaxclip.per_example.quantiles import track_quantile

__all__ = ["clipped_value_and_grad", "form_of", "track_quantile"]

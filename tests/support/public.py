"""Every public name of the library, those of `optaxclip.contrib` among them."""

import optaxclip as oc

NAMES = [*oc.__all__, *oc.contrib.__all__]


def public(name):
    """What has a public name, in the library or in contrib."""
    return getattr(oc if name in oc.__all__ else oc.contrib, name)

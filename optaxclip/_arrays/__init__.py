"""Arrays and trees of arrays: dtypes, devices, mesh axes, paths, groups."""

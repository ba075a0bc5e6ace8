"""What is known about arrays and trees of them: types, places, splits over a mesh, paths, groups."""

"""Grids of patches: weights, traversal, parts."""

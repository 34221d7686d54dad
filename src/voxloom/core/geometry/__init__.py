"""Affines, and interpolation between grids of voxels."""

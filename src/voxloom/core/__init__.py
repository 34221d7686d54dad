"""Pure arithmetic: boxes, locations, grids, windows, blending weights, traversal, schedules. No files, no threads."""

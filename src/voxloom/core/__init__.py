"""Pure arithmetic: boxes, locations, grids, windows, the weave, padding. No files, no threads."""

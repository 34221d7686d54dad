"""Files and arrays as sources of voxels, and stores that results are written to."""

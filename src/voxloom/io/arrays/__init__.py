"""Arrays as sources of voxels: in memory, in files, of other libraries, put together."""

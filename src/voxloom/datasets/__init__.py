"""Data sets that come with voxloom."""

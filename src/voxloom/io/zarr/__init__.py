"""Zarr: OME-Zarr, NIfTI-Zarr and plain arrays, read chunk by chunk and written shard by shard."""

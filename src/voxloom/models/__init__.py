"""Models: loading them from files and code, and running them on batches."""

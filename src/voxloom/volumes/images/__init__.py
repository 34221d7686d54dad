"""Images: a volume, where it lies in the world, and what it means."""

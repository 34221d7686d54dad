"""One prediction in parts: which there are, computing one, having others do it, and putting the result in its place."""

"""Pictures, for which matplotlib is needed."""

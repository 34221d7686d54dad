"""Runs that can be resumed: what tells one from another, and the log of what is done."""

"""Samplers: which patches of a subject are taken, and taking them."""

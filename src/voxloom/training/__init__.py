"""Patches of many subjects for training: the queue, and what runs it."""

from .queue import Queue

__all__ = ["Queue"]

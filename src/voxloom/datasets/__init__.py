"""Data sets: a synthetic head that is made in memory."""

from .phantom import HeadPhantom

__all__ = ["HeadPhantom"]

"""Data sets: a synthetic head that is made in memory, and a real one that is downloaded."""

from .colin27 import Colin27
from .phantom import HeadPhantom

__all__ = ["Colin27", "HeadPhantom"]

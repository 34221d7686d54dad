"""The loader, under the name where users of TorchIO look for it."""

from .volumes.loading import SubjectsLoader

__all__ = ["SubjectsLoader"]

"""Patches of 3-D medical images too large for a GPU, and a model's outputs woven back into whole volumes."""

import lazy_loader

# What is here is imported when it is first used: the command answers before PyTorch is there. What is where, the .pyi says.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

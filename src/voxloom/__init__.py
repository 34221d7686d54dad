"""Patches of 3-D medical images too large for a GPU, and a model's outputs woven back into whole volumes."""

import gc

import lazy_loader

# What is here is imported when it is first used: the command answers before PyTorch is there. What is where, the .pyi says.
_imported, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> object:
    # What is imported stays. Twice looking for garbage meanwhile, among all that PyTorch has, takes as long as the import.
    is_on = gc.isenabled()
    gc.disable()
    try:
        return _imported(name)
    finally:
        if is_on:
            gc.enable()

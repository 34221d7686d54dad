"""Devices, as users name them."""

from typing import Any

import torch

from ..errors import ModeError

__all__ = ["as_device"]


def as_device(device: Any) -> torch.device:
    """Give a device with its number.

    Raises:
        ModeError: if there is none of that name here.
    """
    try:
        return torch.empty(0, device=torch.device(device)).device
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = "PyTorch calls it 'cuda'" if str(device).lower().startswith("gpu") else str(error).splitlines()[0]
        raise ModeError(f"device is {device!r}, which cannot be used here: {reason}") from error

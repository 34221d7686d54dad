"""The inferer that stands in for MONAI's own."""

import importlib
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from .sliding import sliding_window_inference

__all__ = ["VoxloomInferer"]


def _inferer() -> Any:
    """Give the class that MONAI's own inferers are derived from."""
    try:
        return importlib.import_module("monai.inferers").Inferer
    except ImportError:
        return object


class VoxloomInferer(_inferer()):  # type: ignore[misc]
    """Stands in for MONAI's `SlidingWindowInferer`, in a validation loop, a `SupervisedEvaluator` or a bundle's configuration.

    Args:
        roi_size: see `sliding_window_inference`, as for all others that are not listed.
        sw_batch_size: windows that the network is given at a time.
        overlap: fraction of a window that neighbours share.
        mode: how windows are combined.
        sigma_scale: width of the Gaussian.
        padding_mode: how a volume that is smaller than a window is padded.
        cval: value of that.
        sw_device: where the network runs.
        device: where the result goes.
        progress: show how far it has come.
        cache_roi_weight_map: accepted, and not needed.
        cpu_thresh: number of voxels of a volume above which the result goes to the memory of the CPU.
        buffer_steps: accepted, and not needed.
        buffer_dim: likewise.
        with_coord: give the network the place of each window.
        reduce: `"argmax"` and others of `Predictor`: what is made of the scores of a voxel, which are then never held.
        memory_limit: see `Predictor`.

    Example:
        >>> import torch
        >>> from voxloom.integrations.monai import VoxloomInferer
        >>> inferer = VoxloomInferer(roi_size=16, sw_batch_size=4, overlap=0.5, mode="gaussian", reduce="argmax")
        >>> labels = inferer(torch.rand(1, 1, 40, 30, 20), torch.nn.Conv3d(1, 2, kernel_size=3, padding=1))
        >>> labels.shape, labels.dtype
        (torch.Size([1, 1, 40, 30, 20]), torch.uint8)
    """

    def __init__(
        self,
        roi_size: Sequence[int] | int,
        sw_batch_size: int = 1,
        overlap: Sequence[float] | float = 0.25,
        mode: Any = "constant",
        sigma_scale: Sequence[float] | float = 0.125,
        padding_mode: str = "constant",
        cval: float = 0.0,
        sw_device: Any = None,
        device: Any = None,
        progress: bool = False,
        cache_roi_weight_map: bool = False,
        cpu_thresh: int | None = None,
        buffer_steps: int | None = None,
        buffer_dim: int = -1,
        with_coord: bool = False,
        *,
        reduce: Any = None,
        memory_limit: int | str | None = None,
    ) -> None:
        super().__init__()
        self.roi_size, self.sw_batch_size, self.overlap, self.mode = roi_size, sw_batch_size, overlap, mode
        self.sigma_scale, self.padding_mode, self.cval = sigma_scale, padding_mode, cval
        self.sw_device, self.device, self.progress, self.cpu_thresh = sw_device, device, progress, cpu_thresh
        self.with_coord, self.reduce, self.memory_limit = with_coord, reduce, memory_limit

    def __repr__(self) -> str:
        return f"VoxloomInferer({self.roi_size}, overlap={self.overlap}, mode={self.mode!r}, reduce={self.reduce!r})"

    def __call__(self, inputs: Tensor, network: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Apply a network to a batch; see `sliding_window_inference`."""
        device = kwargs.pop("device", self.device)
        kwargs.pop("buffer_steps", None)
        kwargs.pop("buffer_dim", None)
        if device is None and self.cpu_thresh is not None and inputs.shape[2:].numel() > self.cpu_thresh:
            device = "cpu"
        return sliding_window_inference(
            inputs,
            self.roi_size,
            self.sw_batch_size,
            network,
            self.overlap,
            self.mode,
            self.sigma_scale,
            self.padding_mode,
            self.cval,
            self.sw_device,
            device,
            self.progress,
            None,
            None,
            None,
            -1,
            self.with_coord,
            *args,
            reduce=self.reduce,
            memory_limit=self.memory_limit,
            **kwargs,
        )

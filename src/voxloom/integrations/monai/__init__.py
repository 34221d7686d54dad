"""Dictionaries, transforms, inferers and bundles of MONAI."""

from .bundles import load
from .inferers import VoxloomInferer
from .objects import Labelled, as_dict, batch_transform_of, dataset_of, from_dict, image_of, subject_of, transform_of
from .sliding import sliding_window_inference

__all__ = [
    "Labelled",
    "VoxloomInferer",
    "as_dict",
    "batch_transform_of",
    "dataset_of",
    "from_dict",
    "image_of",
    "load",
    "sliding_window_inference",
    "subject_of",
    "transform_of",
]

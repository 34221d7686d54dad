"""Everything that holds or cuts data, under the name where users of TorchIO look for it."""

from .aggregation.aggregators import GridAggregator, PatchAggregator
from .core.locations import PatchLocation
from .sampling.by_label import LabelSampler
from .sampling.grid import GridSampler
from .sampling.mixed import MixedSampler
from .sampling.random import PatchSampler, UniformSampler
from .sampling.weighted import WeightedSampler
from .training import Queue
from .volumes.batch import ImagesBatch, SubjectsBatch
from .volumes.images.image import Image, LabelMap, ScalarImage
from .volumes.loading import SubjectsDataset, SubjectsLoader
from .volumes.subject import Subject

__all__ = [
    "GridAggregator",
    "GridSampler",
    "Image",
    "ImagesBatch",
    "LabelMap",
    "LabelSampler",
    "MixedSampler",
    "PatchAggregator",
    "PatchLocation",
    "PatchSampler",
    "Queue",
    "ScalarImage",
    "Subject",
    "SubjectsBatch",
    "SubjectsDataset",
    "SubjectsLoader",
    "UniformSampler",
    "WeightedSampler",
]

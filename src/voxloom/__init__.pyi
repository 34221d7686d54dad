from . import data, datasets, errors, inference, integrations, loader, plot
from ._version import __version__
from .aggregation.aggregators import GridAggregator, PatchAggregator
from .core.grid.grids import PatchGrid
from .core.grid.windows import Gaussian
from .core.locations import PatchLocation
from .inference import PredictionPlan, Predictor, Regions, plan, predict
from .io.arrays.memory import ArraySource
from .io.dicom import stored_dicom
from .io.labels import Label
from .io.protocols import SpaceCodes, VolumeSource, VolumeSpec, VolumeStore
from .io.zarr.source import open_zarr
from .io.zarr.store import ZarrStore
from .models.loading import load_model
from .models.packing import save_model
from .models.spec import Crop, ModelSpec
from .runtime.chunk_cache import set_chunk_cache
from .runtime.kept_memory import kept_memory
from .sampling.by_label import LabelSampler
from .sampling.grid import GridSampler
from .sampling.indexing import build_index
from .sampling.mixed import MixedSampler
from .sampling.random import PatchSampler, UniformSampler
from .sampling.weighted import WeightedSampler
from .training import Queue
from .volumes.batch import ImagesBatch, SubjectsBatch
from .volumes.cache import SubjectsCache
from .volumes.constants import AFFINE, CHANNELS_DIMENSION, DATA, INTENSITY, LABEL, LOCATION, PATH, SAMPLING_MAP, STEM, TYPE
from .volumes.converting import convert
from .volumes.images.image import Image, LabelMap, ScalarImage
from .volumes.label_files import split_labels, write_label_table
from .volumes.libraries import as_image
from .volumes.loading import SubjectsDataset, SubjectsLoader
from .volumes.subject import Subject
from .volumes.transforms import Compose
from .volumes.views.intensities import Intensity

__all__ = [
    "AFFINE",
    "CHANNELS_DIMENSION",
    "DATA",
    "INTENSITY",
    "LABEL",
    "LOCATION",
    "PATH",
    "SAMPLING_MAP",
    "STEM",
    "TYPE",
    "ArraySource",
    "Compose",
    "Crop",
    "Gaussian",
    "GridAggregator",
    "GridSampler",
    "Image",
    "ImagesBatch",
    "Intensity",
    "Label",
    "LabelMap",
    "LabelSampler",
    "MixedSampler",
    "ModelSpec",
    "PatchAggregator",
    "PatchGrid",
    "PatchLocation",
    "PatchSampler",
    "PredictionPlan",
    "Predictor",
    "Queue",
    "Regions",
    "ScalarImage",
    "SpaceCodes",
    "Subject",
    "SubjectsBatch",
    "SubjectsCache",
    "SubjectsDataset",
    "SubjectsLoader",
    "UniformSampler",
    "VolumeSource",
    "VolumeSpec",
    "VolumeStore",
    "WeightedSampler",
    "ZarrStore",
    "__version__",
    "as_image",
    "build_index",
    "convert",
    "data",
    "datasets",
    "errors",
    "inference",
    "integrations",
    "kept_memory",
    "load_model",
    "loader",
    "open_zarr",
    "plan",
    "plot",
    "predict",
    "save_model",
    "set_chunk_cache",
    "split_labels",
    "stored_dicom",
    "write_label_table",
]

"""From patches back to volumes: samplers that cover a volume, aggregators that weave it together again, and prediction."""

from ..sampling.grid import GridSampler
from .aggregators import GridAggregator, PatchAggregator
from .plans import PredictionPlan
from .predictor import Predictor, plan, predict
from .reductions import Regions
from .sinks import MemorySink, Sink, VolumeForm

__all__ = [
    "GridAggregator",
    "GridSampler",
    "MemorySink",
    "PatchAggregator",
    "PredictionPlan",
    "Predictor",
    "Regions",
    "Sink",
    "VolumeForm",
    "plan",
    "predict",
]

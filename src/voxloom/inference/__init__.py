"""From patches back to volumes: samplers that cover a volume, and aggregators that weave it together again."""

from ..sampling.grid import GridSampler
from .aggregators import GridAggregator, PatchAggregator

__all__ = ["GridAggregator", "GridSampler", "PatchAggregator"]

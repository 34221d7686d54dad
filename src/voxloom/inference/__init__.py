"""From patches back to volumes: samplers that cover a volume, aggregators that put it together again, and prediction."""

from ..aggregation.aggregators import GridAggregator, PatchAggregator
from ..io.writing.sinks import Sink
from ..sampling.grid import GridSampler
from .functions import plan, predict
from .memory_sink import MemorySink
from .parts.launchers import Launcher, ProcessLauncher, SerialLauncher
from .parts.shard_plan import ShardPlan
from .parts.shards import ShardedRun
from .planning.plan import PredictionPlan
from .predictor import Predictor
from .reductions import Regions
from .runner import Executor, FirstBatch, Runner
from .threads import ThreadExecutor

__all__ = [
    "Executor",
    "FirstBatch",
    "GridAggregator",
    "GridSampler",
    "Launcher",
    "MemorySink",
    "PatchAggregator",
    "PredictionPlan",
    "Predictor",
    "ProcessLauncher",
    "Regions",
    "Runner",
    "SerialLauncher",
    "ShardPlan",
    "ShardedRun",
    "Sink",
    "ThreadExecutor",
    "plan",
    "predict",
]

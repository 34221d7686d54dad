"""From patches back to volumes: accumulators, and the aggregators that users call."""

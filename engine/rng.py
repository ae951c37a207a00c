"""Randomness as a function, not a history: every draw of a run is computed from (seed, purpose, epoch, index or step).

So batches, crops and masks do not depend on workers, processes or accumulation, nor on where a run was interrupted.
"""

import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch


def hash64(*keys) -> np.ndarray:
    """64 well-mixed bits for any keys: SplitMix64 (Steele et al. 2014) chained over ints, int arrays and names."""
    state = np.zeros((), np.uint64)
    with np.errstate(over="ignore"):
        for key in keys:
            key = zlib.crc32(key.encode()) if isinstance(key, str) else key
            state = (state ^ np.asarray(key).astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return state


def uniform(draws: int, *keys) -> np.ndarray:
    """`draws` numbers in [0, 1) for each element of the keys: (..., draws) float64."""
    keys = [np.asarray(key)[..., None] if not isinstance(key, str) else key for key in keys]
    return (hash64(*keys, np.arange(draws)) >> np.uint64(11)) * 2.0**-53


def seed(*keys) -> int:
    """63 bits, for torch.manual_seed and its like."""
    return int(hash64(*keys) >> np.uint64(1))


class Prefetch:
    """function(step) for one step after the other, each computed in a thread while the step before is under way. What it returns must be a function of the
    step alone; the first one, and one that is asked for out of turn, are computed at once. No thread before that: a loader's processes are forked first."""

    def __init__(self, function):
        self.function, self.pool, self.step, self.coming = function, ThreadPoolExecutor(1), None, None

    def take(self, step: int):
        result = self.coming.result() if step == self.step else self.function(step)
        self.step = step + 1
        self.coming = self.pool.submit(self.function, self.step)
        return result


def generator(*keys) -> torch.Generator:
    """A CPU generator that is a function of its keys."""
    return torch.Generator().manual_seed(seed(*keys))

"""Random numbers as a function of keys: each draw of a run is computed from (seed, purpose, epoch, index or step).

There is no generator whose state has to be saved. So batches, crops and masks depend neither on the number of workers
and processes nor on gradient accumulation, and a resumed run draws the same numbers as an uninterrupted one.
"""

import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch


def hash64(*keys) -> np.ndarray:
    """Hash keys to 64 well-mixed bits, by SplitMix64 (Steele et al. 2014), applied to one key after the other.

    Args:
        keys: integers, integer arrays, or strings; arrays are broadcast against each other.

    Returns:
        An array of uint64 with the broadcast shape.
    """
    state = np.zeros((), np.uint64)
    with np.errstate(over="ignore"):
        for key in keys:
            key = zlib.crc32(key.encode()) if isinstance(key, str) else key
            state = (state ^ np.asarray(key).astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return state


def uniform(count: int, *keys) -> np.ndarray:
    """Draw `count` numbers from [0, 1) for each element of the keys. Returns (..., count), float64."""
    keys = [np.asarray(key)[..., None] if not isinstance(key, str) else key for key in keys]
    return (hash64(*keys, np.arange(count)) >> np.uint64(11)) * 2.0**-53  # a double has 53 bits of precision


def seed(*keys) -> int:
    """A seed of 63 bits for torch.manual_seed."""
    return int(hash64(*keys) >> np.uint64(1))


def generator(*keys) -> torch.Generator:
    """A torch.Generator on the CPU whose seed is a function of the keys."""
    return torch.Generator().manual_seed(seed(*keys))


class Prefetch:
    """Compute function(step + 1) in a thread while the caller works on function(step).

    The function must depend on the step alone. The first result, and one that is requested out of order, are computed
    at once. The thread starts after the first result: the data loader forks its workers before that, and a process
    should not be forked while it has threads.
    """

    def __init__(self, function):
        self.function, self.pool = function, ThreadPoolExecutor(1)
        self.next_step, self.future = None, None

    def take(self, step: int):
        result = self.future.result() if step == self.next_step else self.function(step)
        self.next_step = step + 1
        self.future = self.pool.submit(self.function, self.next_step)
        return result

"""Random numbers that are a pure function. In: a seed, a purpose and counters. Out: 64-bit words.

Nothing is drawn in sequence, so that a number never depends on which rank draws it, on what was drawn before, or on a resume.
Used for the order of images, their augmentation, the masks of the BERT objective, and the order of the SGD probe.

Purposes keep the streams of one seed apart: 0, 4, 5 and 10 are the order's (data/order.py), 1 to 3 the augmentation's
(data/loader.py), 6 the shuffle buffer's (data/streaming.py), 7 and 8 the masks' (model/objectives.py),
9 the mask draws' (evaluate/likelihood.py), 11 dropout's (model/dropout.py), 31 the SGD probe's (evaluate/probes/rows.py).
"""

from __future__ import annotations

import numpy as np

_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, the step of the splitmix64 generator
_MASK64 = (1 << 64) - 1


def random_words(seed: int, purpose: int, *counters: np.ndarray) -> np.ndarray:
    """Uniform 64-bit words that depend on (seed, purpose, counters) alone.

    Args:
        counters: integers; shapes broadcast, [N] and [N] to [N], [B, 1] and [T] to [B, T]. The last one costs most.

    Returns:
        uint64, of the broadcast shape.
    """
    words = np.full(1, (seed ^ (purpose * _GOLDEN)) & _MASK64, dtype=np.uint64)
    for counter in counters:
        words = _mix(_mix(words) ^ counter.astype(np.uint64))
    return words


def _mix(words: np.ndarray) -> np.ndarray:
    """One step of splitmix64: uint64 -> uint64, a bijection in which each input bit moves half of the output bits."""
    words = words + np.uint64(_GOLDEN)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))

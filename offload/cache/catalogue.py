"""All cache policies by name."""

from collections.abc import Callable

from routing.ground.expect import expect_name

from .learned import LearnedReuse
from .policies import LFU, LRU, ActivationAware, Belady, Cache, DecayedFrequency, StaticHotList
from .predicted import PredictedUse

CACHES: dict[str, Callable[[int, int], Cache]] = {
    "lru": lambda capacity, num_keys: LRU(capacity),
    "lfu": lambda capacity, num_keys: LFU(capacity),
    "static": lambda capacity, num_keys: StaticHotList(capacity),
    "eam": ActivationAware,
    "score": lambda capacity, num_keys: DecayedFrequency(capacity),
    "learned": LearnedReuse,
    "predicted": PredictedUse,
    "belady": lambda capacity, num_keys: Belady(capacity),
}
NEEDS_FUTURE = frozenset({"belady"})
NEEDS_PREDICTOR = frozenset({"predicted"})
"""Policies that a predictor of whole passes tells what is coming (`trace predictor --before-pass`)."""


def make_cache(policy: str, capacity: int, num_keys: int) -> Cache:
    """A cache by the name of its policy.

    Args:
        policy: name in CACHES.
        capacity: keys it can hold.
        num_keys: keys there are.

    Raises:
        ValueError: if no policy has this name; the message lists those there are.
    """
    return CACHES[expect_name(policy, CACHES, "cache policy")](capacity, num_keys)

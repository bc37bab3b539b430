"""What arrays that are spread over several JAX processes need: the whole of one, on every process.

`jax.distributed.initialize` joins processes; whoever starts them calls it before anything else of JAX.
"""

import jax
import numpy as np
from jax import Array
from jax.experimental import multihost_utils


def whole_array(array: Array) -> np.ndarray:
    """All of an array; where it is spread over processes, all of them call this together."""
    if not isinstance(array, Array) or array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def is_writing() -> bool:
    """Whether this process writes files; the others only give what they have."""
    return jax.process_index() == 0

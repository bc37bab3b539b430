"""A word to whoever trains a router that the language-model loss cannot reach."""

import functools
import logging

_log = logging.getLogger(__name__)


@functools.cache
def warn_of_constant_weights(kind: str) -> None:
    """Log, once per kind of router in a process, that its one weight per token is constant.

    Args:
        kind: name of the router's class.
    """
    _log.warning(
        "%s: with one expert per token (and head) a renormalised weight is constant, so the language-model loss gives "
        "the router no gradient and only balance losses train it; take weights that are not renormalised (the routers "
        "'switch' and 'olmoe'), or more experts per token",
        kind,
    )

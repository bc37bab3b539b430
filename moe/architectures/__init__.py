"""Architectures that change more than the router, one per file, and the literal dict that names them."""

import inspect
from collections.abc import Callable
from difflib import get_close_matches

from ..parts.config import MoEConfig
from .body import Body
from .chain import chain_of_experts
from .duo import duo_llm
from .feature_groups import feature_groups
from .glider import glider
from .hydra import hydra
from .latent import latent
from .memory.peer import peer
from .memory.ultramem import ultramem
from .mixture_of_transformers import mixture_of_transformers
from .mode import mode
from .moex import moex
from .plain import plain
from .read_me.architecture import readme
from .recursion.architecture import mixture_of_recursions

ARCHITECTURES: dict[str, Callable[..., Body]] = {
    "moe": plain,
    "chain_of_experts": chain_of_experts,
    "duo_llm": duo_llm,
    "feature_groups": feature_groups,
    "glider": glider,
    "hydra": hydra,
    "mixture_of_recursions": mixture_of_recursions,
    "latent": latent,
    "readme": readme,
    "moex": moex,
    "mixture_of_transformers": mixture_of_transformers,
    "mode": mode,
    "peer": peer,
    "ultramem": ultramem,
}


def build_body(config: MoEConfig) -> Body:
    """What `config.architecture` makes of the config, refined by `config.architecture_options`.

    Raises:
        ValueError: if the name or an option is unknown, or sizes and options do not fit together.
    """
    build = ARCHITECTURES.get(config.architecture)
    if build is None:
        raise ValueError(_unknown("architecture", config.architecture, list(ARCHITECTURES)))
    options = config.architecture_options or {}
    known = [name for name in inspect.signature(build).parameters if name != "config"]
    for name in sorted(set(options) - set(known)):
        raise ValueError(_unknown(f"option of the architecture {config.architecture!r}:", name, known))
    return build(config, **options)


def _unknown(what: str, name: str, known: list[str]) -> str:
    near = get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"unknown {what} {name!r}; {hint}known are {', '.join(known) or 'none'}"


__all__ = ["ARCHITECTURES", "Body", "build_body"]

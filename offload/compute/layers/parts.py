"""The parts of a decoder layer of the common form, found by their names; a trial says whether the form is right.

The form: a norm, attention with rotary positions, a sum, a norm, a feed-forward, a sum. Queries and keys may have
norms, over each head or over all of them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...formats.resident.linears import PLAIN_LINEARS
from ...formats.resident.stored_weight import stored_bytes
from ..linears import TokenWeight
from ..matvec import is_in_memory
from ..norms import TokenNorm

INPUTS, OUTPUT = ("q_proj", "k_proj", "v_proj"), "o_proj"
HEAD_NORMS = ("q_norm", "k_norm")
NORMS = ("input_layernorm", "post_attention_layernorm")
ROUTERS = ("gate", "router")


@dataclass(frozen=True)
class LayerParts:
    """What a decoder layer computes with.

    Args:
        attention: its attention module.
        feed_forward: name of the module after the second norm.
        norms: before attention and before the feed-forward.
        head_norms: of queries and of keys; None for none.
        inputs: linear layers of queries, keys and values.
        output: linear layer of what was attended to.
        router: what holds a `TokenWeight` that multiplies the feed-forward's input; None if there is none.
    """

    attention: Any
    feed_forward: str
    norms: tuple[TokenNorm, TokenNorm]
    head_norms: tuple[TokenNorm | None, TokenNorm | None]
    inputs: tuple[Any, Any, Any]
    output: Any
    router: Any

    @property
    def head_width(self) -> int:
        return int(self.attention.head_dim)

    @property
    def heads(self) -> int:
        """Heads of queries."""
        return int(self.output.in_features) // self.head_width

    @property
    def shared_heads(self) -> int:
        """Heads of keys and values."""
        return int(self.inputs[1].out_features) // self.head_width

    def weights(self) -> Iterator[tuple[nn.Module, str]]:
        """Every parameter whose address C gets: its module and name there."""
        norms = (norm.module for norm in (*self.norms, *self.head_norms) if norm is not None)
        yield from ((module, "weight") for module in norms)
        for module in (*self.inputs, self.output, *([] if self.router is None else [self.router])):
            yield module, "weight"
            if getattr(module, "bias", None) is not None:
                yield module, "bias"


def find_parts(layer: nn.Module) -> LayerParts | None:
    """The parts of a layer whose modules are named as usual, with weights in memory; None for others."""
    children = dict(layer.named_children())
    found = [module for module in children.values() if {*INPUTS, OUTPUT} <= dict(module.named_children()).keys()]
    norms = tuple(_token_norm(children.get(name)) for name in NORMS)
    others = [name for name, module in children.items() if name not in NORMS and module not in found]
    if len(found) != 1 or len(others) != 1 or None in norms or "forward" in vars(layer):
        return None
    attention: Any = found[0]
    own = dict(attention.named_children())
    head_norms = tuple(_token_norm(own.get(name)) for name in HEAD_NORMS)
    is_normed = [isinstance(own.get(name), nn.Module) for name in HEAD_NORMS]
    if own.keys() - {*INPUTS, OUTPUT, *HEAD_NORMS} or is_normed != [norm is not None for norm in head_norms]:
        return None
    router = _router(children[others[0]])
    linears = tuple(own[name] for name in INPUTS)
    parts = LayerParts(attention, others[0], norms, head_norms, linears, own[OUTPUT], router)  # type: ignore[arg-type]
    return parts if _are_usual(parts) else None


def _token_norm(module: nn.Module | None) -> TokenNorm | None:
    """What was found out about a norm."""
    norm = getattr(vars(module).get("forward"), "__self__", None) if module is not None else None
    return norm if isinstance(norm, TokenNorm) else None


def _router(feed_forward: nn.Module) -> nn.Module | None:
    found = [module for name, module in feed_forward.named_children() if name in ROUTERS]
    return found[0] if found and isinstance(getattr(found[0], "weight", None), TokenWeight) else None


def _are_usual(parts: LayerParts) -> bool:
    """Whether C can read all weights, and widths belong together."""
    linears, width = (*parts.inputs, parts.output), getattr(parts.attention, "head_dim", 0)
    if not isinstance(width, int) or width < 2 or any(type(linear) not in PLAIN_LINEARS for linear in linears):
        return False
    usable = (getattr(module, name) for module, name in parts.weights() if module is not parts.router)
    if not all(each.dtype == torch.bfloat16 and each.is_contiguous() and _is_in_memory(each) for each in usable):
        return False
    model_width = parts.inputs[0].in_features
    query, key, value = (linear.out_features for linear in parts.inputs)
    return (
        key == value
        and query == parts.output.in_features
        and all(linear.in_features == model_width for linear in parts.inputs)
        and parts.output.out_features == model_width
        and query % width == key % width == 0
        and query % key == 0
        and all(norm.module.weight.shape[0] == model_width for norm in parts.norms)
        and all(
            norm is None or rows % norm.module.weight.shape[0] == 0
            for norm, rows in zip(parts.head_norms, (query, key), strict=True)
        )
    )


def _is_in_memory(weight: torch.Tensor) -> bool:
    return is_in_memory(stored_bytes(weight))

"""The four operations on feed-forward units; a unit is a row of the gate, a row of up, and a column of down.

Source: Xiao et al. 2024 (Configurable Foundation Models), arXiv:2409.02877, which names the operations (retrieval,
merging, updating, growing) and gives no equations: how each is done for a unit is ours, and stands at its function.

Shapes: F hidden units of a dense feed-forward network, D model width, B sequences, L layers.
"""

from collections.abc import Iterator
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn.functional import normalize

from ..dense_to_experts.domain_masks import mean_activations

PARTS = ("gate_proj", "up_proj", "down_proj")


def strength(model: Any, token_BS: Tensor) -> Tensor:
    """float32 [L, F]: mean absolute activation of each unit on some text, which says what the text retrieves."""
    return mean_activations(model, token_BS).mean(dim=0)


def retrieve(model: Any, strength_LF: Tensor, keep: int) -> Any:
    """The model with the `keep` strongest units of each layer, in their order. Changes `model`, and returns it.

    Raises:
        ValueError: if so many are not there.
    """
    F = strength_LF.shape[1]
    if not 1 <= keep <= F:
        raise ValueError(f"units to keep must lie in 1..{F}, the units of a layer; got {keep}")
    for mlp, strength_F in zip(_networks(model), strength_LF, strict=True):
        kept = strength_F.topk(keep).indices.sort().values
        _put(mlp, {name: _take(mlp, name, kept) for name in PARTS})
    model.config.intermediate_size = keep
    return model


def merge(model: Any, other: Any, share: float = 0.5) -> Any:
    """Units of both models, paired within each layer by the likeness of all their weights, averaged.

    Two models of one base hold like units in other places; a mean without pairing would mix strangers.

    Args:
        model, other: of equal sizes; `model` is changed and returned.
        share: of `other` in the mean, 0 to 1; the rest of the weights is averaged place by place.

    Raises:
        ValueError: if sizes differ, or the share is out of range.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share must lie in 0..1; got {share}")
    _expect_like(model, other)
    pairs = list(zip(_networks(model), _networks(other), strict=True))
    for mlp, its in pairs:
        order = _likest(_units(mlp), _units(its))
        _put(mlp, {name: _take(mlp, name).lerp(_take(its, name, order), share) for name in PARTS})
    theirs = dict(other.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".mlp." not in name:
                parameter.lerp_(theirs[name].to(parameter), share)
    return model


def update(model: Any, other: Any, strength_LF: Tensor, count: int) -> Any:
    """The `count` units of each layer that a text retrieves, as they are in `other`; the rest stays.

    Args:
        model, other: of equal sizes, `other` a later version of `model`, which is changed and returned.
        strength_LF: of the units on the text whose knowledge is updated.
        count: units per layer.

    Raises:
        ValueError: if sizes differ, or so many are not there.
    """
    _expect_like(model, other)
    F = strength_LF.shape[1]
    if not 0 <= count <= F:
        raise ValueError(f"units to update must lie in 0..{F}, the units of a layer; got {count}")
    for mlp, its, strength_F in zip(_networks(model), _networks(other), strength_LF, strict=True):
        chosen = strength_F.topk(count).indices
        for name in PARTS:
            axis = _axis(name)
            with torch.no_grad():
                getattr(mlp, name).weight.index_copy_(axis, chosen, _take(its, name, chosen))
    return model


def grow(model: Any, count: int, seed: int = 0) -> Any:
    """The model with `count` new units per layer that write nothing yet: the same function, with room to learn.

    The rows that read are drawn like the ones that are there; the columns that write are 0. Changes `model`, and
    returns it.

    Raises:
        ValueError: if there is nothing to add.
    """
    if count < 1:
        raise ValueError(f"units to add must be at least 1; got {count}")
    generator = torch.Generator().manual_seed(seed)
    for mlp in _networks(model):
        new = {}
        for name in PARTS:
            old, axis = _take(mlp, name), _axis(name)
            shape = list(old.shape)
            shape[axis] = count
            drawn = torch.zeros(shape) if axis else torch.randn(shape, generator=generator) * float(old.float().std())
            new[name] = torch.cat([old, drawn.to(old)], dim=axis)
        _put(mlp, new)
    model.config.intermediate_size += count
    return model


def _networks(model: Any) -> Iterator[nn.Module]:
    """The feed-forward networks of a dense Llama-type model. Raises ValueError if a layer has none of that kind."""
    for number, layer in enumerate(model.model.layers):
        mlp = getattr(layer, "mlp", None)
        if not all(isinstance(getattr(mlp, name, None), nn.Linear) for name in PARTS):
            raise ValueError(f"layer {number} has no dense gated feed-forward network; bricks are units of such ones")
        if any(getattr(mlp, name).bias is not None for name in PARTS):
            raise ValueError(f"the feed-forward network of layer {number} has biases, which belong to no unit")
        yield mlp


def _axis(name: str) -> int:
    """Along which axis of a matrix its units lie."""
    return 1 if name == "down_proj" else 0


def _take(mlp: nn.Module, name: str, units: Tensor | None = None) -> Tensor:
    weight = getattr(mlp, name).weight.detach()
    return weight if units is None else weight.index_select(_axis(name), units)


def _put(mlp: nn.Module, matrices: dict[str, Tensor]) -> None:
    for name, matrix in matrices.items():
        layer = getattr(mlp, name)
        layer.weight = nn.Parameter(matrix.contiguous())
        layer.out_features, layer.in_features = matrix.shape
    if hasattr(mlp, "intermediate_size"):
        mlp.intermediate_size = matrices["gate_proj"].shape[0]


def _units(mlp: nn.Module) -> Tensor:
    """[F, 3 D]: each unit's weights, every part of length 1."""
    parts = (_take(mlp, name).float() for name in PARTS)
    return torch.cat([normalize(x.T if _axis(name) else x, dim=1) for name, x in zip(PARTS, parts, strict=True)], dim=1)


def _likest(ours: Tensor, theirs: Tensor) -> Tensor:
    """int64 [F]: their unit for each of ours, one to one, so that the sum of likenesses is largest."""
    _, order = linear_sum_assignment((ours @ theirs.T).cpu().numpy(), maximize=True)
    return torch.from_numpy(order)


def _expect_like(model: Any, other: Any) -> None:
    mine, theirs = ({name: p.shape for name, p in one.named_parameters()} for one in (model, other))
    if mine != theirs:
        name = next(name for name in {**mine, **theirs} if mine.get(name) != theirs.get(name))
        raise ValueError(
            f"both models must have the same parameters; {name} is {_shape(mine.get(name))} in the first and "
            f"{_shape(theirs.get(name))} in the second"
        )


def _shape(shape: torch.Size | None) -> str:
    return "missing" if shape is None else str(list(shape))

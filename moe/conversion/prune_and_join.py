"""Fewer experts, or those of two models: pruning and joining, for families that fuse their experts' weights.

Pruning keeps some experts of each layer and their rows of the router. Joining puts the experts of two checkpoints
of the same backbone beside each other, router rows too, to start a larger model from.

Source: Kim et al. 2021, arXiv:2109.10465, sections 4.2 (expert pruning) and 4.3 (aggregation of experts).

Shapes: L MoE layers, E experts, P kept experts per layer, D model width.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from routing import RoutingTrace
from routing.ground.model_config import experts_per_token

COUNT_NAMES = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
BACKBONES = ("same", "first", "second", "mean")


def most_used(trace: RoutingTrace, num_kept: int) -> NDArray[np.int64]:
    """The experts [L, P] that a trace uses most, in the order of their ids; ties go to the lower id.

    Raises:
        ValueError: if the trace does not have so many experts.
    """
    _expect_kept(num_kept, trace.num_experts)
    return np.sort(np.argsort(-usage(trace), axis=1, kind="stable")[:, :num_kept], axis=1)


def usage(trace: RoutingTrace) -> NDArray[np.int64]:
    """How often each expert was visited, [L, E]."""
    return np.stack(
        [
            np.bincount(layer_TK[layer_TK >= 0], minlength=trace.num_experts)
            for layer_TK in trace.expert_TLK.transpose(1, 0, 2)
        ]
    )


def drawn(num_layers: int, num_experts: int, num_kept: int, seed: int) -> NDArray[np.int64]:
    """Random experts [L, P], in the order of their ids."""
    _expect_kept(num_kept, num_experts)
    generator = np.random.default_rng(seed)
    chosen = [generator.choice(num_experts, num_kept, replace=False) for _ in range(num_layers)]
    return np.sort(np.stack(chosen), axis=1)


@torch.no_grad()
def prune(model: Any, expert_LP: NDArray[np.int64]) -> Any:
    """A model of the same class with only some experts per layer; everything else is the same tensor by tensor.

    Args:
        model: a mixture-of-experts model of transformers or ours, with its weights.
        expert_LP: which experts each MoE layer keeps, in their new order.

    Raises:
        ValueError: if the model's experts or routers are not of a known form, or the choice does not fit.
    """
    layers, E = list(expert_layers(model)), num_experts(model.config)
    if expert_LP.ndim != 2 or len(expert_LP) != len(layers):
        raise ValueError(f"expected kept experts of {len(layers)} MoE layers; got {expert_LP.shape}")
    num_kept = expert_LP.shape[1]
    _expect_kept(num_kept, E)
    if expert_LP.min() < 0 or expert_LP.max() >= E or any(len(set(row)) < num_kept for row in expert_LP.tolist()):
        raise ValueError(f"kept experts must be different ids in 0..{E - 1} in every layer")
    top_k = experts_per_token(model.config)
    expect_no_groups(model.config)
    if num_kept < top_k:
        raise ValueError(
            f"the model visits {top_k} experts per token, so at least {top_k} must be kept; got {num_kept}"
        )
    state = model.state_dict()
    for layer, kept_P in zip(layers, torch.from_numpy(expert_LP), strict=True):
        for name in layer.expert_tensors:
            state[name] = state[name][kept_P]
        for name in layer.router_tensors:
            rows = torch.cat([kept_P, torch.arange(E, len(state[name]))])  # rows beyond E are zero-compute experts
            state[name] = state[name][rows]
    return rebuilt(model, state, num_kept)


@torch.no_grad()
def join(first: Any, second: Any, backbone: str = "same") -> Any:
    """A model with the experts of both, those of `first` before those of `second`, and their router rows.

    Args:
        first, second: models of one class and size; the number of experts may differ.
        backbone: what the rest is: the `same` in both, that of the `first` or `second`, or their `mean`.

    Raises:
        ValueError: if the models do not fit together, or the rest differs and `backbone` does not say what to take.
    """
    if backbone not in BACKBONES:
        raise ValueError(f"backbone must be one of {', '.join(BACKBONES)}; got {backbone!r}")
    _expect_one_family(first, second)
    expect_no_groups(first.config)
    states, counts = [m.state_dict() for m in (first, second)], [num_experts(m.config) for m in (first, second)]
    pieces = list(zip(expert_layers(first), expert_layers(second), strict=True))
    state = dict(states[0])
    joined = {name for layer, _ in pieces for name in (*layer.expert_tensors, *layer.router_tensors)}
    for name in joined:
        E, tensors = counts[0], [states[0][name], states[1][name]]
        state[name] = torch.cat([tensors[0][:E], tensors[1][: counts[1]], tensors[0][E:]])
    for name in state.keys() - joined:
        state[name] = _backbone(name, states[0][name], states[1][name], backbone)
    return rebuilt(first, state, sum(counts))


@dataclass(frozen=True)
class ExpertTensors:
    """Names of the tensors of one MoE layer whose first dimension is the experts.

    Args:
        expert_tensors: weights of experts.
        router_tensors: rows of the router, and what it keeps per expert; zero-compute experts may follow the E experts.
    """

    expert_tensors: tuple[str, ...]
    router_tensors: tuple[str, ...]


def expert_layers(model: nn.Module) -> Iterator[ExpertTensors]:
    """The expert tensors of each MoE layer, first to last.

    Raises:
        ValueError: if there are none, or something beside them depends on the number of experts in an unknown way.
    """
    E, found = num_experts(model.config), False  # type: ignore[arg-type]
    for name, module in model.named_modules():
        if not (hasattr(module, "gate_up_proj") or hasattr(module, "up_proj")) or not hasattr(module, "down_proj"):
            continue
        own = {f"{name}.{key}": value for key, value in module.state_dict().items()}
        if any(value.ndim < 2 or len(value) != E for value in own.values()) or not _is_tensor(module.down_proj):
            continue
        found = True
        parent = name.rpartition(".")[0]
        yield ExpertTensors(tuple(own), tuple(_router_tensors(model, parent, set(own), E)))
    if not found:
        raise ValueError(f"{type(model).__name__} has no experts with fused weights [E, ...]")


def num_experts(config: Any) -> int:
    """E, from the names that configs use for it. Raises ValueError if there is none."""
    for name in COUNT_NAMES:
        if isinstance(getattr(config, name, None), int):
            return int(getattr(config, name))
    raise ValueError(f"the config names no number of experts; looked for {', '.join(COUNT_NAMES)}")


def _router_tensors(model: nn.Module, parent: str, experts: set[str], E: int) -> Iterator[str]:
    """What stands beside the experts with one row per expert."""
    rows = E + len(getattr(model.config, "zero_compute_experts", ()))
    for key, value in model.get_submodule(parent).state_dict().items():
        name = f"{parent}.{key}"
        if name in experts or ".shared" in f".{key}" or "zero_compute" in key:
            continue
        if value.ndim and len(value) == rows and value.ndim <= 2 and rows not in value.shape[1:]:
            yield name
        elif rows in value.shape:
            raise ValueError(
                f"{name} {tuple(value.shape)} depends on the {rows} experts in a way that pruning and joining do not "
                "know; only routers with one row per expert can be cut"
            )


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def rebuilt(model: Any, state: dict[str, Tensor], count: int) -> Any:
    """A model of the same class with another number of experts and these tensors.

    Raises:
        ValueError: if they are not the tensors of such a model.
    """
    config = type(model.config).from_dict(model.config.to_dict())
    name = next(name for name in COUNT_NAMES if isinstance(getattr(config, name, None), int))
    setattr(config, name, count)
    with torch.device("meta"):
        changed = type(model)(config)
    expected = {key: tuple(value.shape) for key, value in changed.state_dict().items()}
    wrong = [key for key, value in state.items() if expected.get(key) != tuple(value.shape)]
    if wrong or expected.keys() != state.keys():
        raise ValueError(f"a model of {count} experts does not take these tensors: {', '.join(sorted(wrong)[:3])}")
    changed.load_state_dict(state, assign=True)
    changed.tie_weights()
    _carry_over_buffers(model, changed)
    changed.config._experts_implementation = model.config._experts_implementation
    return changed.eval()


def _carry_over_buffers(model: nn.Module, rebuilt: nn.Module) -> None:
    """Buffers that no checkpoint holds, such as rotary frequencies; they do not depend on the experts."""
    held = set(rebuilt.state_dict())
    for name, buffer in model.named_buffers():
        if name not in held:
            parent, _, key = name.rpartition(".")
            setattr(rebuilt.get_submodule(parent), key, buffer.clone())


def _expect_one_family(first: Any, second: Any) -> None:
    if type(first) is not type(second):
        raise ValueError(
            f"only models of one class can be joined; got {type(first).__name__} and {type(second).__name__}"
        )
    if different := different_fields(first.config, second.config, COUNT_NAMES):
        raise ValueError(f"the two models differ in {', '.join(different[:5])}; joining needs one backbone")


def different_fields(first: Any, second: Any, ignored: Sequence[str] = ()) -> list[str]:
    """Names of the fields in which two configs differ, besides names, dtype and versions."""
    left_out = {*ignored, "_name_or_path", "dtype", "transformers_version"}
    ours, theirs = ({k: v for k, v in c.to_dict().items() if k not in left_out} for c in (first, second))
    return sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))


def _backbone(name: str, first: Tensor, second: Tensor, backbone: str) -> Tensor:
    if backbone == "second":
        return second
    if backbone == "mean" and first.is_floating_point():
        return ((first.double() + second.double()) / 2).to(first.dtype)
    if backbone == "same" and not torch.equal(first, second):
        raise ValueError(
            f"the two models differ outside their experts, first in {name}; say which backbone to take: "
            "first, second or mean"
        )
    return first


def expect_no_groups(config: Any) -> None:
    """Raises ValueError if experts stand in groups, which another number of experts would shift."""
    own = getattr(config, "router_options", None) or {}
    if max(getattr(config, "n_group", None) or 1, own.get("num_groups", 1)) > 1:
        raise ValueError("its router chooses among fixed groups of experts, which fewer or more experts would shift")


def _expect_kept(num_kept: int, E: int) -> None:
    if not 1 <= num_kept <= E:
        raise ValueError(f"the number of kept experts must lie in 1..{E}; got {num_kept}")

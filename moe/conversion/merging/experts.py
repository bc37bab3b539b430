"""Fewer experts by averaging similar ones: the third beside pruning and joining.

Experts of a layer are clustered by what they compute or by their weights; each cluster becomes one expert, the mean of
its members weighted by how often each is used.

Shapes: L MoE layers, E experts, T tokens, D model width, F expert width.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.cluster.hierarchy import cut_tree, linkage
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from routing.ground.model_config import experts_per_token

from ..prune_and_join import ExpertTensors, expect_no_groups, expert_layers, num_experts, rebuilt

SIMILARITIES = ("outputs", "weights")


@dataclass(frozen=True, eq=False)
class ExpertFacts:
    """What a text tells about the experts of one layer.

    Args:
        count_E: how many tokens visit each expert.
        output_ED: mean output of each expert over all tokens, whether they visit it or not.
    """

    count_E: NDArray[np.int64]
    output_ED: Tensor


@torch.no_grad()
def facts_on(model: Any, token_BS: Tensor) -> list[ExpertFacts]:
    """Usage and mean outputs of all experts on some text, layer by layer.

    Source: Chen et al. 2024 (HC-SMoE), arXiv:2410.08589, section 3: expert outputs averaged over calibration data.
    """
    E = num_experts(model.config)
    with _expert_calls(model) as calls:
        model(token_BS, use_cache=False)
    found = []
    for module, x_TD, expert_TK in calls:
        count_E = np.bincount(expert_TK[expert_TK < E].flatten().numpy(), minlength=E)
        ones_T1 = torch.ones(len(x_TD), 1, dtype=x_TD.dtype)
        outputs = [module(x_TD, torch.full((len(x_TD), 1), e), ones_T1).double().mean(dim=0) for e in range(E)]
        found.append(ExpertFacts(count_E, torch.stack(outputs)))
    return found


@contextmanager
def _expert_calls(model: nn.Module) -> Iterator[list[tuple[nn.Module, Tensor, Tensor]]]:
    """Inside, each call of an experts module leaves the module, its tokens and their experts."""
    seen: list[tuple[nn.Module, Tensor, Tensor]] = []
    modules = [model.get_submodule(_module_name(layer)) for layer in expert_layers(model)]
    handles = [
        module.register_forward_pre_hook(lambda module, inputs: seen.append((module, inputs[0], inputs[1])))
        for module in modules
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def clusters(point_EN: NDArray[np.float64], keep: int) -> list[list[int]]:
    """Experts grouped by average linkage of Euclidean distances, in the order of each group's lowest id.

    Source: Chen et al. 2024 (HC-SMoE), arXiv:2410.08589, section 3.
    """
    E = len(point_EN)
    if keep == E:
        return [[expert] for expert in range(E)]
    label_E = cut_tree(linkage(point_EN, method="average"), n_clusters=keep)[:, 0]
    groups = [np.flatnonzero(label_E == label).tolist() for label in range(keep)]
    return sorted(groups, key=lambda group: group[0])


@dataclass(frozen=True, kw_only=True)
class MergedExperts:
    """A model with fewer experts, and how it was made.

    Args:
        model: of the same class.
        groups: per layer, the old experts of each new one.
    """

    model: Any
    groups: list[list[list[int]]]


@torch.no_grad()
def merge_experts(
    model: Any,
    keep: int,
    *,
    similarity: str,
    facts: Sequence[ExpertFacts] | None = None,
    count_LE: NDArray[np.int64] | None = None,
    align: bool = False,
) -> MergedExperts:
    """Average similar experts of each layer, and their rows of the router, until `keep` are left.

    Args:
        model: a mixture-of-experts model of transformers or ours, with its weights.
        keep: experts per layer, from K to E.
        similarity: `outputs` (needs `facts`) or `weights`.
        facts: per layer, of `facts_on`.
        count_LE: how often each expert is used; without it the facts', and without those all count the same.
        align: first permute each expert's hidden channels to match the most used one of its group.

    Raises:
        ValueError: if the model's experts or routers are not of a known form, or the choice does not fit.

    Source: Chen et al. 2024 (HC-SMoE), arXiv:2410.08589, section 3; Li et al. 2023 (M-SMoE), arXiv:2310.01334,
        section 3: weights by usage, alignment. Both keep a router of E rows and redirect them; here rows are averaged
        as well, so that the result is an ordinary checkpoint.
    """
    layers, E, top_k = list(expert_layers(model)), num_experts(model.config), experts_per_token(model.config)
    expect_no_groups(model.config)
    if not top_k <= keep <= E:
        raise ValueError(f"the number of experts to keep must lie in {top_k}..{E} (K..E); got {keep}")
    if similarity == "outputs" and facts is None:
        raise ValueError("experts are compared by their outputs on a text; give one, or compare their weights")
    if count_LE is None:
        count_LE = np.ones((len(layers), E), np.int64) if facts is None else np.stack([f.count_E for f in facts])
    if count_LE.shape != (len(layers), E):
        raise ValueError(f"the model has {len(layers)} layers of {E} experts; the usage is of {count_LE.shape}")
    state, groups = model.state_dict(), []
    for number, layer in enumerate(layers):
        if facts is not None and similarity == "outputs":
            point_EN = facts[number].output_ED.numpy()
        else:
            point_EN = np.concatenate([_flat(state[name]) for name in layer.expert_tensors], axis=1)
        groups.append(clusters(point_EN, keep))
        weights = [_shares(count_LE[number], group) for group in groups[-1]]
        for group, share in zip(groups[-1], weights, strict=True):
            if align and len(group) > 1:
                _align(state, layer, group, group[int(share.argmax())])
        for name in (*layer.expert_tensors, *layer.router_tensors):
            state[name] = _averaged(state[name], groups[-1], weights, E)
    return MergedExperts(model=rebuilt(model, state, keep), groups=groups)


def _module_name(layer: ExpertTensors) -> str:
    return layer.expert_tensors[0].rpartition(".")[0]


def _flat(tensor: Tensor) -> NDArray[np.float64]:
    return tensor.flatten(1).double().numpy()


def _shares(count_E: NDArray[np.int64], group: list[int]) -> Tensor:
    """Each member's part of the visits to its group; equal parts of a group that nobody visits."""
    count = torch.from_numpy(count_E[group]).double()
    return count / count.sum() if count.sum() else torch.full((len(group),), 1 / len(group), dtype=torch.float64)


def _averaged(tensor: Tensor, groups: list[list[int]], weights: list[Tensor], E: int) -> Tensor:
    """Rows of groups as weighted means; what follows the E rows (zero-compute experts) as it is."""
    means = [
        (share.view(-1, *[1] * (tensor.ndim - 1)) * tensor[group].double()).sum(dim=0)
        for group, share in zip(groups, weights, strict=True)
    ]
    return torch.cat([torch.stack(means).to(tensor.dtype), tensor[E:]])


def _align(state: dict[str, Tensor], layer: ExpertTensors, group: list[int], leader: int) -> None:
    """Permute the hidden channels of a group's experts to match the leader's; none of them computes anything else.

    Source: Ainsworth et al. 2022 (Git Re-Basin), arXiv:2209.04836, section 3.2 (matching weights), as M-SMoE uses it.
    """
    names = {name.rpartition(".")[2]: name for name in layer.expert_tensors}
    if names.keys() != {"gate_up_proj", "down_proj"}:
        raise ValueError(f"experts with {', '.join(sorted(names))} cannot be aligned; leave out align")
    up_E2FD, down_EDF = state[names["gate_up_proj"]].clone(), state[names["down_proj"]].clone()
    if up_E2FD.shape[1] != 2 * down_EDF.shape[2]:
        raise ValueError("experts whose matrices are transposed cannot be aligned; leave out align")
    channels = {expert: _channels(up_E2FD[expert], down_EDF[expert]) for expert in group}
    for expert in group:
        if expert == leader:
            continue
        _, order_F = linear_sum_assignment(-(channels[leader] @ channels[expert].T).numpy())
        gate_FD, up_FD = up_E2FD[expert].chunk(2)
        up_E2FD[expert] = torch.cat([gate_FD[order_F], up_FD[order_F]])
        down_EDF[expert] = down_EDF[expert][:, order_F]
    state[names["gate_up_proj"]], state[names["down_proj"]] = up_E2FD, down_EDF


def _channels(up_2FD: Tensor, down_DF: Tensor) -> Tensor:
    """[F, 3D]: every weight of each hidden channel, in its gate, up and down projection."""
    return torch.cat([*up_2FD.double().chunk(2), down_DF.double().T], dim=1)

"""The routers of a model of ours or of a transformers family, as losses and measures see them.

Shapes: T tokens, L MoE layers, K experts per token, B sequences, S positions.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from moe import MoEForCausalLM
from offload import softmax_gates
from routing import ClassicRouter, RouterStats, Routing, RoutingTrace, anchor_loss
from routing.traces import EMPTY


class Seen:
    """What routers did in one call of the model.

    Args:
        stats: one per MoE layer, with gradient to the gates.
        anchors: KL divergence of each layer from its router before tuning, in nats.
    """

    def __init__(self) -> None:
        self.stats: list[RouterStats] = []
        self.anchors: list[Tensor] = []


class TunableRouters(Protocol):
    """The routers of a model."""

    parameters: dict[str, nn.Parameter]
    """What is trained, by its name in the model."""

    def watch(self, model: Any, token_BS: Tensor) -> tuple[Any, Seen]:
        """Call the model on whole sequences; its output, and what its routers did."""
        ...


def routers_of(model: nn.Module) -> TunableRouters:
    """How to watch and train the routers of a model.

    Raises:
        ValueError: if there are no gates to train, or they are of a kind that is not known.
    """
    return OurRouters(model) if isinstance(model, MoEForCausalLM) else FamilyGates(model)


class OurRouters:
    """Routers of our own models, whose output has their statistics.

    Raises:
        ValueError: if a router has no parameters, or decides for another layer than its own.
    """

    def __init__(self, model: MoEForCausalLM) -> None:
        routers = model.model.routers
        own = {id(parameter) for router in routers for parameter in router.parameters()}
        self.parameters = {name: p for name, p in model.named_parameters() if id(p) in own}
        if not self.parameters or not all(isinstance(router, ClassicRouter) for router in routers):
            kinds = ", ".join(sorted({type(router).__name__ for router in routers})) or "none"
            raise ValueError(f"routers to tune must score experts for their own layer; this model has {kinds}")
        self._before = [copy.deepcopy(router).requires_grad_(False) for router in routers]

    def watch(self, model: Any, token_BS: Tensor) -> tuple[Any, Seen]:
        seen = Seen()

        def compare(place: int, inputs: tuple[Any, ...], result: tuple[Any, ...]) -> None:
            with torch.no_grad():
                anchor_TR = self._before[place](*inputs)[2].probability_TR
            seen.anchors.append(anchor_loss(result[2].probability_TR, anchor_TR))

        handles = [
            router.register_forward_hook(lambda _, inputs, result, place=place: compare(place, inputs, result))
            for place, router in enumerate(model.model.routers)
        ]
        with _removed(handles):
            output = model(token_BS, use_cache=False)
        seen.stats = output.router_stats
        return output, seen


class FamilyGates:
    """Softmax gates of transformers' families, read where they are called."""

    def __init__(self, model: nn.Module) -> None:
        self._gates = softmax_gates(model)
        own = {id(gate.weight_ED) for gate in self._gates}
        self.parameters = {name: p for name, p in model.named_parameters() if id(p) in own}
        self._before = [gate.weight_ED.detach().clone() for gate in self._gates]

    def watch(self, model: Any, token_BS: Tensor) -> tuple[Any, Seen]:
        seen, (B, S) = Seen(), token_BS.shape
        sequence_T = torch.arange(B, device=token_BS.device).repeat_interleave(S)

        def note(place: int, x: Tensor, expert_TK: Tensor) -> None:
            gate = self._gates[place]
            logit_TR = gate.logits(x)
            probability_TR = logit_TR.softmax(dim=-1)
            weight_TK = probability_TR.gather(1, expert_TK)
            routing = Routing(expert_TK=expert_TK, weight_TK=weight_TK, num_experts=logit_TR.shape[1])
            seen.stats.append(
                RouterStats(
                    probability_TR=probability_TR,
                    chosen=routing,
                    kept=routing,
                    logit_TR=logit_TR,
                    sequence_T=sequence_T,
                )
            )
            anchor_TR = gate.logits(x.detach(), self._before[place]).softmax(dim=-1)
            seen.anchors.append(anchor_loss(probability_TR, anchor_TR))

        handles = [
            gate.experts.register_forward_pre_hook(lambda _, inputs, place=place: note(place, inputs[0], inputs[1]))
            for place, gate in enumerate(self._gates)
        ]
        with _removed(handles):
            output = model(input_ids=token_BS, use_cache=False)
        return output, seen


def trace_of(calls: list[list[RouterStats]], batch_sizes: list[int], source: str) -> RoutingTrace:
    """The FFN experts of several calls on whole sequences, one call per list of layers."""
    num_experts = calls[0][0].num_experts
    parts = [np.stack([_ids(stats.kept.expert_TK, num_experts) for stats in layers], axis=1) for layers in calls]
    lengths = [len(part) // rows for part, rows in zip(parts, batch_sizes, strict=True)]
    sequence = np.repeat(np.arange(sum(batch_sizes), dtype=np.int32), np.repeat(lengths, batch_sizes))
    return RoutingTrace(
        expert_TLK=np.concatenate(parts), sequence_T=sequence, metadata={"num_experts": num_experts, "source": source}
    )


def _ids(expert_TK: Tensor, num_experts: int) -> np.ndarray:
    ids = expert_TK.cpu().numpy()
    return np.where(ids < num_experts, ids, EMPTY).astype(np.int16)


@contextmanager
def _removed(handles: list[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

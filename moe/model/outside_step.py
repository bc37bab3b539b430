"""Balancing under somebody else's training loop: a hook on the optimiser tells the routers that a step is done.

Shapes: R routable experts.
"""

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from routing import RouterStats

ANSWERS = {
    "output_router_logits": "`output.router_stats[i].logit_TR` always has them, and the balance loss is in the loss",
    "output_hidden_states": "put a forward hook on the decoder layers instead",
    "output_attentions": "the attention is computed without its matrix",
}


def expect_known_outputs(asked: dict[str, Any]) -> None:
    """Raises ValueError for an output that transformers' own models give and ours do not."""
    for name, answer in ANSWERS.items():
        if asked.get(name):
            raise ValueError(f"{name}=True is not supported by this model: {answer}")


_WATCHED: weakref.WeakKeyDictionary[nn.Module, "OutsideSteps"] = weakref.WeakKeyDictionary()
"""Beside the models instead of in them: a hook can be neither copied nor pickled with a model."""


def outside_steps(model: nn.Module) -> "OutsideSteps":
    """The one watch of a model, made at its first training pass."""
    if model not in _WATCHED:
        _WATCHED[model] = OutsideSteps(model)
    return _WATCHED[model]


class OutsideSteps:
    """Sums what routers saw since the last optimiser step, and calls `post_step` after the next one.

    transformers' `Trainer` never calls `post_step`, and accumulates gradients over several forward passes. A step that
    a gradient scaler skips does not count. Frozen routers (an adapter is trained beside them) keep their balance.

    Args:
        model: has `routers` and `post_step`; held weakly.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)
        self._counts: list[Tensor] = []
        self._num_tokens = 0
        hook = register_optimizer_step_post_hook(self._after_step)
        weakref.finalize(model, hook.remove)

    def note(self, stats: Sequence[RouterStats], num_tokens: int) -> None:
        """Add one forward pass in training.

        Args:
            stats: one per router call.
            num_tokens: tokens that are not padding.
        """
        counts = [call.count_R.detach() for call in stats]
        self._counts = [a + b for a, b in zip(self._counts, counts, strict=True)] if self._counts else counts
        self._num_tokens += num_tokens

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        model = self._model()
        if model is None or not self._num_tokens:
            return
        ours = {id(parameter) for parameter in model.parameters()}
        if not any(id(parameter) in ours for group in optimizer.param_groups for parameter in group["params"]):
            return
        counts, num_tokens = self._counts, self._num_tokens
        self._counts, self._num_tokens = [], 0
        if any(parameter.requires_grad for router in model.routers for parameter in router.parameters()):
            model.post_step(*over_processes(model.routers, counts, num_tokens))
        else:
            model.optimizer_step += 1


def over_processes(routers: Sequence[nn.Module], counts: list[Tensor], num_tokens: int) -> tuple[list[Tensor], int]:
    """What all processes of `torch.distributed` counted in a step; routers without state need no exchange.

    Tensors that routers noted of the last micro-batch are taken from the last process, which has that micro-batch when
    processes take turns.
    """
    parallel = torch.distributed
    if not (parallel.is_available() and parallel.is_initialized() and parallel.get_world_size() > 1):
        return counts, num_tokens
    if not any(buffer.is_floating_point() for router in routers for buffer in router.buffers()):
        return counts, num_tokens
    flat = torch.cat([counts[0].new_tensor([num_tokens]), *counts])
    parallel.all_reduce(flat)
    for router in routers:
        for note in router.notes():
            parallel.broadcast(note, src=parallel.get_world_size() - 1)
    pieces = flat[1:].split([len(count_R) for count_R in counts])
    return list(pieces), int(flat[0])

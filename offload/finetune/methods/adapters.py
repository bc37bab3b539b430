"""Fine-tuning by low-rank adapters of a frozen model, whose experts may be stored in any form.

PEFT makes the adapters, names them and writes them. Outside experts it also computes them. Experts' adapters are
computed with the expert, while it is in its slot: once in the forward pass, and once more, with gradients, in the
backward pass.

Source: Hu et al. 2022 (LoRA), arXiv:2106.09685; Dettmers et al. 2023 (QLoRA), arXiv:2305.14314, for frozen weights
stored in fewer bits.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from routing.traces import RoutingTrace

from ...checkpoint.experts import ExpertLayer, experts_modules
from ...compute.adapters import Adapted, shown_to_peft, take_over
from ...runtime.opening import OpenedCheckpoint
from ..examples import PackedRows
from ..options import TuneOptions
from ..passing.frozen_layers import quicken_frozen_layers
from ..passing.losses import backward_passes, relative_error
from ..passing.opening import TunedModel, open_tuned, spilled_activations
from ..passing.rows import Seen, Weights
from .expert_adapters import ExpertAdapters, OwnedAdapters, most_used, num_chosen

ADAM_BYTES, WRITTEN_BYTES = 16, 4
"""Of one parameter of an adapter in float32: itself, its gradient and two moments; and where it is only written."""


class Adapters:
    """The method `lora`.

    Args:
        source: the model's folder or id.
        out: the run's folder.
        options: the run's settings.
        rows: what to learn.
        memory: `cache_experts` or `cpu_memory`, as `open_tuned` takes them.
    """

    joins_passes = True

    def __init__(self, source: str | Path, out: Path, options: TuneOptions, rows: PackedRows, **memory: Any) -> None:

        self._source, self._options, self._rows = source, options, rows
        self._tuned: TunedModel = open_tuned(
            source, options, **memory, kept_bytes=lambda opened: adapter_bytes(opened, options)
        )
        self.experts = self._tuned.experts
        self.experts.method = self
        self._owner_LE = _owners(self._tuned.layers, options)
        self.peft, adapted = _adapted(self._tuned, source, options)
        self.of_experts = OwnedAdapters(adapted, self._owner_LE) if self._owner_LE else ExpertAdapters(adapted)
        others = [value for value in self.peft.parameters() if value.requires_grad]
        self._trained = [*others, *self.of_experts.parameters]
        self._spilled = spilled_activations(self._tuned, out, options)
        self._is_first = True
        self._optimizer = torch.optim.AdamW(
            self._trained,
            lr=options.rate,
            betas=(options.beta1, options.beta2),
            weight_decay=options.weight_decay,
            fused=True,
        )

    def close(self) -> None:
        """End threads, close files."""
        self._tuned.close()
        if self._spilled is not None:
            self._spilled.close()

    def step(self, number: int) -> dict[str, Any]:
        """One step of AdamW on all adapters."""
        exact = self._exact_gradients(number) if self._is_first and self._is_coded else None
        self._is_first = False
        loss = self.gradients(number)
        told = {} if self._spilled is None else self._spilled.as_metrics()
        if exact is not None:
            told["gradient_error"] = relative_error(self._gradients, exact)
        norm = torch.nn.utils.clip_grad_norm_(self._trained, self._options.clip_norm or float("inf"))
        for group in self._optimizer.param_groups:
            group["lr"] = self._options.rate_at(number + 1)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return {"loss": loss, "lm_loss": loss, "gradient_norm": norm.item(), **told}

    @property
    def _is_coded(self) -> bool:
        return self._spilled is not None and self._spilled.is_coded

    @property
    def _gradients(self) -> list[torch.Tensor]:
        return [value.grad for value in self._trained if value.grad is not None]

    def _exact_gradients(self, number: int) -> list[torch.Tensor]:
        """A step's gradients with activations as they are, to compare those with."""
        assert self._spilled is not None
        with self._spilled.exact():
            self.gradients(number)
        found = [grad.clone() for grad in self._gradients]
        self._optimizer.zero_grad()
        return found

    def gradients(self, number: int) -> float:
        """Add a step's gradients to those of the adapters; its loss."""
        batches = self._rows.batches(number, self._options)
        loss = backward_passes(self.peft, self.experts, batches, self._spilled)
        self.of_experts.finish()
        return loss

    def enter(self, number: int) -> None:
        """All passes see the same model."""

    def seen(self, layer: int, expert: int, stored: Weights) -> Callable[[int], Seen]:
        """An expert with its adapters, whose factors collect the gradients of all passes."""
        seen = Seen(stored, self.of_experts.factors(layer, expert))
        return lambda number: seen

    def take(self, layer: int, expert: int, seen: Sequence[Seen]) -> None:
        self.of_experts.take(layer, expert, seen[0].adapters)

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """The adapters and AdamW's moments."""
        tensors = {f"adapter.{number}": value.detach().clone() for number, value in enumerate(self._trained)}
        for number, value in enumerate(self._trained):
            for name, moment in self._optimizer.state[value].items():
                tensors[f"{name}.{number}"] = moment.clone()
        return tensors, {"owners": self._owner_LE}

    def committed(self) -> None:
        """Nothing on the disk waits for a commit."""

    def restore(self, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> None:
        """Continue from a commit.

        Raises:
            KeyError, RuntimeError, ValueError: if it is of other adapters.
        """
        if facts["owners"] != self._owner_LE:
            raise ValueError("the run was begun with adapters of other experts; give it the same --usage")
        for number, value in enumerate(self._trained):
            value.data.copy_(tensors[f"adapter.{number}"])
            moments = (name for name in ("step", "exp_avg", "exp_avg_sq") if f"{name}.{number}" in tensors)
            self._optimizer.state[value] = {name: tensors[f"{name}.{number}"].clone() for name in moments}

    def publish(self, out: Path) -> None:
        """Write `adapter_config.json` and `adapter_model.safetensors`."""
        self.of_experts.publish()
        self.peft.save_pretrained(out)


def _adapted(tuned: TunedModel, source: str | Path, options: TuneOptions) -> tuple[Any, list[Adapted]]:
    """The model with PEFT's adapters, and those of each layer's experts."""
    # here, because the other methods and `fit` do without PEFT
    from peft import LoraConfig, get_peft_model

    modules = list(experts_modules(tuned.model).values())
    parameters = [] if options.experts == "none" else _of_experts(tuned.layers)
    targets = list(options.targets)
    if options.adapt_routers:
        parameters += _router_parameters(tuned.model, tuned.layers)
    config = LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,  # type: ignore[arg-type]
        target_modules="all-linear" if targets == ["all-linear"] else targets,
        target_parameters=parameters or None,
        base_model_name_or_path=str(source),
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(options.seed)
    try:
        with shown_to_peft(tuned.layers, modules):
            peft = get_peft_model(tuned.model, config)
    except ValueError as error:
        raise ValueError(f"adapters for {', '.join(targets) or 'experts only'}: {str(error)[:300]}") from error
    adapted = take_over(peft, tuned.layers, modules)
    quicken_frozen_layers(peft)
    return peft.eval(), adapted


def _owners(layers: Sequence[ExpertLayer], options: TuneOptions) -> list[list[int | None]]:
    """Which adapter each expert has, where there are fewer than experts; else empty."""
    if options.experts == "shared":
        return [[0] * layer.num_experts for layer in layers]
    if options.experts == "used":
        assert options.usage is not None
        trace = RoutingTrace.load(options.usage)
        return most_used(trace, options.expert_share, [layer.num_experts for layer in layers])
    return []


def _of_experts(layers: Sequence[ExpertLayer]) -> list[str]:
    """Names of the matrices of experts without the numbers of layers, as PEFT's configuration has them."""
    names = {_without_number(parameter.full_name) for layer in layers for parameter in layer.parameters}
    return sorted(names)


def _without_number(name: str) -> str:
    return re.split(r"\.\d+\.", name)[-1]


def _router_parameters(model: Any, layers: Sequence[ExpertLayer]) -> list[str]:
    """Names of the routers' matrices: those of a layer's own parts with one row for each expert.

    Raises:
        ValueError: if there is none that PEFT can adapt as a parameter.
    """
    found = set()
    for layer in layers:
        parent = layer.module_name.rpartition(".")[0]
        for name, module in model.get_submodule(parent).named_modules():
            weight = module._parameters.get("weight")
            if weight is not None and weight.dim() == 2 and len(weight) == layer.num_experts and name:
                found.add(_without_number(f"{parent}.{name}.weight"))
    if not found:
        raise ValueError("this model's routers have no matrix with one row per expert; leave out --adapt-routers")
    return sorted(found)


def adapter_bytes(opened: OpenedCheckpoint, options: TuneOptions) -> int:
    """What adapters take, AdamW's moments and gradients included."""
    linears = (module for module in opened.model.modules() if isinstance(module, nn.Linear))
    found = ADAM_BYTES * sum(options.rank * (linear.in_features + linear.out_features) for linear in linears)
    if options.experts == "none":
        return found
    for form in opened.forms:
        of_one = options.rank * sum(sum(parameter.shape) for parameter in form.layer.parameters)
        count = form.layer.num_experts
        if options.experts == "each":
            found += ADAM_BYTES * of_one * count
        else:
            trained = 1 if options.experts == "shared" else num_chosen(options.expert_share, count)
            found += ADAM_BYTES * of_one * trained + WRITTEN_BYTES * of_one * count
    return found

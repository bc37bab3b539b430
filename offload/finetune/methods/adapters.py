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

from ...checkpoint.experts import ExpertLayer, experts_modules
from ...compute.adapters import Adapted, LowRank, shown_to_peft, take_over
from ...runtime.opening import OpenedCheckpoint
from ..examples import PackedRows
from ..options import TuneOptions
from ..passing.experts import Seen, Weights
from ..passing.losses import backward_passes
from ..passing.opening import TunedModel, open_tuned

ADAM_BYTES = 16
"""Of one parameter of an adapter in float32: itself, its gradient and two moments."""


class Adapters:
    """The method `lora`.

    Args:
        source: the model's folder or id.
        out: the run's folder.
        options: the run's settings.
        rows: what to learn.
        memory: `cache_experts` or `cpu_memory`, as `open_tuned` takes them.
    """

    def __init__(self, source: str | Path, out: Path, options: TuneOptions, rows: PackedRows, **memory: Any) -> None:
        self._source, self._options, self._rows = source, options, rows
        self._tuned: TunedModel = open_tuned(
            source, options, **memory, kept_bytes=lambda opened: adapter_bytes(opened, options)
        )
        self.experts = self._tuned.experts
        self.experts.method = self
        self.peft, adapted = _adapted(self._tuned, source, options)
        kind = SharedAdapters if options.experts == "shared" else ExpertAdapters
        self.of_experts: ExpertAdapters = kind(adapted)
        others = [value for value in self.peft.parameters() if value.requires_grad]
        self._trained = [*others, *self.of_experts.parameters]
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

    def step(self, number: int) -> dict[str, Any]:
        """One step of AdamW on all adapters."""
        loss = self.gradients(number)
        norm = torch.nn.utils.clip_grad_norm_(self._trained, self._options.clip_norm or float("inf"))
        for group in self._optimizer.param_groups:
            group["lr"] = self._options.rate_at(number + 1)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return {"loss": loss, "lm_loss": loss, "gradient_norm": norm.item()}

    def gradients(self, number: int) -> float:
        """Add a step's gradients to those of the adapters; its loss."""
        loss = backward_passes(self.peft, self.experts, self._rows.batches(number, self._options))
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
        return tensors, {}

    def committed(self) -> None:
        """Nothing on the disk waits for a commit."""

    def restore(self, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> None:
        """Continue from a commit.

        Raises:
            KeyError, RuntimeError: if it is of other adapters.
        """
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
    return peft.eval(), take_over(peft, tuned.layers, modules)


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
    elements = sum(
        form.layer.num_experts * options.rank * sum(sum(parameter.shape) for parameter in form.layer.parameters)
        for form in (() if options.experts == "none" else opened.forms)
    )
    linears = (module for module in opened.model.modules() if isinstance(module, nn.Linear))
    elements += sum(options.rank * (linear.in_features + linear.out_features) for linear in linears)
    return ADAM_BYTES * elements


class ExpertAdapters:
    """One adapter for each expert, in PEFT's own tensors.

    Args:
        adapted_L: PEFT's wrappers of each layer; none where experts are not adapted.
    """

    def __init__(self, adapted_L: Sequence[Adapted]) -> None:
        self._adapted_L = list(adapted_L)
        self.parameters: list[nn.Parameter] = []
        """Trained tensors that PEFT does not know."""

    def factors(self, layer: int, expert: int) -> dict[str, LowRank]:
        """An expert's adapters by parameter name; their factors collect gradients."""
        return {name: _leaf(matrix.of(expert)) for name, matrix in self._adapted_L[layer].items()}

    def take(self, layer: int, expert: int, factors: Mapping[str, LowRank]) -> None:
        """Add what the factors of one expert have collected to the gradients of PEFT's tensors."""
        for name, matrix in self._adapted_L[layer].items():
            grad_a, grad_b = (_grad_of(weight) for weight in matrix.weights)
            grad_a.view(matrix.a_ErI.shape)[expert] += factors[name].a_rI.grad
            grad_b.view(matrix.b_OrE.shape)[:, :, expert] += factors[name].b_Or.grad

    def finish(self) -> None:
        """All gradients of a step are there; experts that no token visited have zeros, as in a resident model."""
        for adapted in self._adapted_L:
            for matrix in adapted.values():
                for weight in matrix.weights:
                    _grad_of(weight)

    def publish(self) -> None:
        """PEFT's tensors hold everything already."""


class SharedAdapters(ExpertAdapters):
    """One adapter for all experts of a layer. PEFT's format has one for each, so it is written once for each.

    Args:
        adapted_L: PEFT's wrappers of each layer; the first expert's share is where the shared adapter begins.
    """

    def __init__(self, adapted_L: Sequence[Adapted]) -> None:
        super().__init__(adapted_L)
        self._shared_L = [{name: _own(matrix.of(0)) for name, matrix in adapted.items()} for adapted in adapted_L]
        self.parameters = [part for shared in self._shared_L for low in shared.values() for part in _factors(low)]
        self._collected: dict[tuple[int, int], Mapping[str, LowRank]] = {}
        for adapted in adapted_L:
            for matrix in adapted.values():
                for weight in matrix.weights:
                    weight.requires_grad_(False)

    def factors(self, layer: int, expert: int) -> dict[str, LowRank]:
        return {name: _leaf(low) for name, low in self._shared_L[layer].items()}

    def take(self, layer: int, expert: int, factors: Mapping[str, LowRank]) -> None:
        self._collected[layer, expert] = factors

    def finish(self) -> None:
        """Add the gradients of all experts, in the order of their ids whichever was there first."""
        for weight in self.parameters:
            _grad_of(weight)
        for (layer, _), factors in sorted(self._collected.items(), key=lambda pair: pair[0]):
            for name, low in self._shared_L[layer].items():
                for weight, part in zip(_factors(low), _factors(factors[name]), strict=True):
                    _grad_of(weight).add_(part.grad)
        self._collected.clear()

    @torch.no_grad()
    def publish(self) -> None:
        """Write the shared adapter into each expert's place."""
        for adapted, shared in zip(self._adapted_L, self._shared_L, strict=True):
            for name, matrix in adapted.items():
                matrix.a_ErI.copy_(shared[name].a_rI.expand_as(matrix.a_ErI))
                matrix.b_OrE.copy_(shared[name].b_Or.unsqueeze(-1).expand_as(matrix.b_OrE))


def _leaf(low: LowRank) -> LowRank:
    return LowRank(*(part.detach().clone().requires_grad_() for part in _factors(low)), low.scale)


def _own(low: LowRank) -> LowRank:
    return LowRank(*(nn.Parameter(part.detach().clone()) for part in _factors(low)), low.scale)


def _factors(low: LowRank) -> tuple[torch.Tensor, torch.Tensor]:
    return low.a_rI, low.b_Or


def _grad_of(weight: torch.Tensor) -> torch.Tensor:
    """The gradient of a trained tensor, zeros at first."""
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight)
    return weight.grad

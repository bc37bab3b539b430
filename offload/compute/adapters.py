"""Low-rank adapters of experts, held by PEFT, for experts whose matrices are elsewhere.

PEFT adapts a parameter `[E, ...]` by a wrapper around the module that has it. Offloaded experts have no such parameter,
so PEFT is shown one of the right shape that takes no memory. It makes its wrappers, names and files as ever; what the
wrappers compute is computed here, one expert at a time.

Shapes: E experts, N rows, I inputs, O outputs.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoint.experts import ExpertLayer

ADAPTER = "default"
"""PEFT's name of the only adapter that a model has."""


@dataclass(frozen=True)
class LowRank:
    """An adapter of one matrix of one expert: `scale * B A` is added to the matrix that maps I inputs to O outputs.

    Args:
        a_rI, b_Or: the two factors.
        scale: PEFT's `lora_alpha / r`.
    """

    a_rI: torch.Tensor
    b_Or: torch.Tensor
    scale: float

    def __call__(self, x_NI: torch.Tensor) -> torch.Tensor:
        """What it adds to the product, `[N, O]`."""
        return (x_NI @ self.a_rI.to(x_NI.dtype).t()) @ self.b_Or.to(x_NI.dtype).t() * self.scale

    def added_to(self, out_NO: torch.Tensor, x_NI: torch.Tensor) -> torch.Tensor:
        """A product with what this adds to it, in the product's place; both inputs are of one dtype."""
        inner_Nr = x_NI @ self.a_rI.to(x_NI.dtype).t()
        return out_NO.addmm_(inner_Nr, self.b_Or.to(x_NI.dtype).t(), alpha=self.scale)

    def pass_back(self, x_NI: torch.Tensor, grad_NO: torch.Tensor, grad_NI: torch.Tensor) -> None:
        """Leave the gradients of the factors at them, and add that of the inputs to `grad_NI`; all of one dtype."""
        a_rI, b_Or = (part.detach().to(x_NI.dtype) for part in (self.a_rI, self.b_Or))
        inner_Nr, grad_Nr = x_NI @ a_rI.t(), grad_NO @ b_Or
        self.b_Or.grad = (grad_NO.t() @ inner_Nr).to(self.b_Or.dtype).mul_(self.scale)
        self.a_rI.grad = (grad_Nr.t() @ x_NI).to(self.a_rI.dtype).mul_(self.scale)
        grad_NI.addmm_(grad_Nr, a_rI, alpha=self.scale)


@dataclass(frozen=True, eq=False)
class AdaptedMatrix:
    """The adapters of one matrix of all experts of a layer, as PEFT's wrapper has them.

    Args:
        wrapper: PEFT's `ParamWrapper`.
        num_experts: E, those of the layer.
    """

    wrapper: Any
    num_experts: int

    @property
    def rank(self) -> int:
        return int(self.wrapper.r[ADAPTER])

    @property
    def scale(self) -> float:
        return float(self.wrapper.scaling[ADAPTER])

    @property
    def weights(self) -> tuple[nn.Parameter, nn.Parameter]:
        """PEFT's two tensors, `[E r, I]` and `[O, r E]`."""
        return self.wrapper.lora_A[ADAPTER].weight, self.wrapper.lora_B[ADAPTER].weight

    @property
    def a_ErI(self) -> torch.Tensor:
        weight = self.weights[0]
        return weight.view(self.num_experts, self.rank, -1)

    @property
    def b_OrE(self) -> torch.Tensor:
        weight = self.weights[1]
        return weight.view(len(weight), self.rank, self.num_experts)

    def of(self, expert: int) -> LowRank:
        """One expert's share."""
        return LowRank(self.a_ErI[expert], self.b_OrE[:, :, expert], self.scale)


Adapted = Mapping[str, AdaptedMatrix]
"""By parameter name."""


def adapted_of(module: Any) -> Adapted:
    """The adapters of an experts module; empty without any."""
    found: Adapted = vars(module).get("_expertier_adapted", {})
    return found


@contextmanager
def shown_to_peft(layers: Sequence[ExpertLayer], modules: Sequence[nn.Module]) -> Iterator[None]:
    """Give experts modules parameters `[E, ...]` without memory, for as long as PEFT makes its wrappers."""
    for layer, module in zip(layers, modules, strict=True):
        for parameter in sorted(layer.parameters, key=lambda parameter: parameter.name == "down_proj"):
            shape = (layer.num_experts, *parameter.shape)
            hollow = torch.zeros((), dtype=parameter.dtype).expand(shape)
            module.register_parameter(parameter.name, nn.Parameter(hollow, requires_grad=False))
    try:
        with warnings.catch_warnings():
            # PEFT asks transformers for a name that is going away, and looks for the patterns that it makes of fused
            # experts among modules only; a user can change neither
            warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
            warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys", RuntimeWarning)
            yield
    finally:
        for layer, module in zip(layers, modules, strict=True):
            for parameter in layer.parameters:
                delattr(module, parameter.name)


def take_over(model: nn.Module, layers: Sequence[ExpertLayer], modules: Sequence[nn.Module]) -> list[Adapted]:
    """Let PEFT's wrappers of experts pass calls on to the experts modules; the adapters of each layer.

    Raises:
        ValueError: if a wrapper is for something other than the matrices of experts.
    """
    from peft.tuners.lora.layer import ParamWrapper

    number = {id(module): place for place, module in enumerate(modules)}
    found: list[dict[str, AdaptedMatrix]] = [{} for _ in modules]
    for wrapper in [module for module in model.modules() if isinstance(module, ParamWrapper)]:
        place = number.get(id(wrapper.get_base_layer()))
        if place is None:
            continue
        names = {parameter.name for parameter in layers[place].parameters}
        if wrapper.parameter_name not in names:
            raise ValueError(
                f"an adapter of {layers[place].module_name}.{wrapper.parameter_name} cannot be used with experts on "
                f"disk; only {', '.join(sorted(names))} of experts can be adapted"
            )
        found[place][wrapper.parameter_name] = AdaptedMatrix(wrapper, layers[place].num_experts)
        wrapper.forward = _pass_on(modules[place])
    return found


def _pass_on(module: nn.Module) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        return module(*args, **kwargs)

    return forward


def load_adapter(model: Any, folder: str | Path, layers: Sequence[ExpertLayer], modules: Sequence[nn.Module]) -> None:
    """Put an adapter in PEFT's format on an offloaded model, unmerged.

    Adapters of experts are left on the experts modules as `_expertier_adapted`; PEFT computes all others.

    Raises:
        ValueError: if the folder holds no such adapter, or it does not fit the model.
    """
    folder = Path(folder)
    if not (folder / "adapter_config.json").is_file() or not (folder / "adapter_model.safetensors").is_file():
        raise ValueError(
            f"adapter {folder}: expected adapter_config.json and adapter_model.safetensors, as PEFT writes"
        )
    from peft import PeftModel

    try:
        with shown_to_peft(layers, modules):
            PeftModel.from_pretrained(model, folder, is_trainable=False)
    except (KeyError, RuntimeError, ValueError, TypeError) as error:
        raise ValueError(f"adapter {folder}: does not fit this model ({str(error)[:300]})") from error
    adapted_L = take_over(model, layers, modules)
    model.has_expert_adapters = any(adapted_L)
    for module, adapted in zip(modules, adapted_L, strict=True):
        if adapted:
            module._expertier_adapted = adapted  # type: ignore[assignment]

"""How sparse the hidden units of feed-forwards are: shares of exact zeros, and PPL-p % sparsity.

A unit's output is its activation times its column of the down matrix. A layer's threshold leaves out units whose output
is shorter. What that costs is measured twice: by the length of what is left out over the length of the layer's output
(CETT), which sets the thresholds of all layers alike, and by the perplexity of the model.

Source: Luo et al. 2024 (Sparsing Law), arXiv:2411.02335, section 3: PPL-p % sparsity is the share of units left out at
the largest CETT at which perplexity rises by at most p %.

Shapes: N rows (tokens, or routed rows of one expert), F hidden units, D model width, Q candidate thresholds.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM

import moe  # noqa: F401  registers our own model type with transformers

from ..checkpoint.experts import experts_modules, weight_names
from ..checkpoint.gguf.head import is_gguf

DOWN_NAMES = ("down_proj", "fc2", "w2", "dense_4h_to_h", "fc_out", "output_linear")
"""What families call the matrix after the activation of a dense feed-forward."""
QUANTILES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.94, 0.97, 0.99)
"""Shares of units whose thresholds are tried; between two, a threshold is interpolated."""
HALVINGS = 8
"""Of the interval in which CETT lies: it is known to 0.4 %."""
WORTHWHILE = 0.5
"""Most of the weights of its feed-forwards that a token may read for units to be called worthwhile. Each layer keeps
what tells active units, too: above half, at most a factor of two is there to win. Not measured."""
PAGE_BYTES = 4096
"""What a disk reads at least; a unit begins anywhere in a page."""


@dataclass(frozen=True, kw_only=True)
class UnitSparsity:
    """What was found.

    Args:
        zeros_L: share of activations of each layer that are exactly zero.
        unit_bytes_L: bytes of a unit of each layer: its rows and its column.
        allowed: how much perplexity may rise, such as 0.01.
        perplexity: of the model as it is; `sparse_perplexity` with the units left out.
        sparsity: share of units left out at that perplexity, exact zeros among them: PPL-p % sparsity.
        tokens: that perplexity is of.
    """

    zeros_L: list[float]
    unit_bytes_L: list[int]
    allowed: float
    perplexity: float
    sparse_perplexity: float
    sparsity: float
    tokens: int

    @property
    def zeros(self) -> float:
        """Mean share of exact zeros."""
        return sum(self.zeros_L) / len(self.zeros_L)

    @property
    def read_share(self) -> float:
        """Share of the weights of its feed-forwards that a token reads by units: whole pages, each for any active unit.

        Active units are taken to lie anywhere. A page of p bytes has bytes of 1 + p / u units of u bytes.
        """
        touched = (
            1 - zeros ** (1 + PAGE_BYTES / unit_bytes)
            for zeros, unit_bytes in zip(self.zeros_L, self.unit_bytes_L, strict=True)
        )
        return sum(touched) / len(self.zeros_L)

    @property
    def is_worthwhile(self) -> bool:
        """Whether reading active units alone leaves out enough without changing what is computed."""
        return self.read_share <= WORTHWHILE

    @property
    def verdict(self) -> str:
        """For people."""
        if self.is_worthwhile:
            return (
                f"sparse: {self.zeros:.1%} of the units are exactly zero, so that a token needs "
                f"{1 - self.zeros:.1%} of the weights of its feed-forwards, and reads {self.read_share:.1%} by pages"
            )
        if self.zeros >= WORTHWHILE:
            return (
                f"sparse, but not enough for units of {min(self.unit_bytes_L)} bytes: {self.zeros:.1%} of them are "
                f"exactly zero, and the pages of the others ({PAGE_BYTES} bytes) hold {self.read_share:.1%} of the "
                "weights; whole feed-forwards or experts are the better pieces"
            )
        lossy = f"; leaving {self.sparsity:.1%} out would cost {self.allowed:.0%} of perplexity and be another model"
        return (
            f"not sparse: {self.zeros:.1%} of the units are exactly zero, and nothing less than "
            f"{WORTHWHILE:.0%} is worth reading units one by one{lossy}"
        )


@dataclass
class _Layer:
    """What a layer has shown so far."""

    unit_bytes: int
    threshold: float = 0.0
    """Units whose output is shorter are left out."""
    num_units: int = 0
    num_zeros: int = 0
    num_left_out: int = 0
    candidate_Q: Tensor | None = None
    cett_Q: Tensor = field(default_factory=lambda: torch.zeros(len(QUANTILES)))
    num_rows: int = 0

    def reset(self) -> None:
        self.num_units = self.num_zeros = self.num_left_out = 0

    def threshold_at(self, cett: float) -> float:
        """The threshold at which so much of the output is left out."""
        assert self.candidate_Q is not None
        mean_Q, before = (self.cett_Q / max(self.num_rows, 1)).tolist(), (0.0, 0.0)
        for found, candidate in zip(mean_Q, self.candidate_Q.tolist(), strict=True):
            if found > cett:
                share = (cett - before[0]) / (found - before[0])
                return before[1] + share * (candidate - before[1])
            before = found, candidate
        return before[1]


class _DownProducts(TorchFunctionMode):
    """Sees every product with a down matrix, and leaves units out of it."""

    def __init__(self, layer_of: Mapping[int, _Layer]) -> None:
        super().__init__()
        self._layer_of = layer_of
        self.is_trying = False
        """Whether candidate thresholds are tried."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not linear or len(args) < 2 or (layer := self._found(args[1])) is None:
            return func(*args, **(kwargs or {}))
        unit, *rest = args
        with torch._C.DisableTorchFunction():
            return func(self._kept(layer, unit, args[1]), *rest, **(kwargs or {}))

    def _found(self, weight: Any) -> _Layer | None:
        return self._layer_of.get(weight.untyped_storage().data_ptr()) if isinstance(weight, Tensor) else None

    def _kept(self, layer: _Layer, unit: Tensor, weight_DF: Tensor) -> Tensor:
        unit_NF = unit.reshape(-1, unit.shape[-1])
        length_NF = unit_NF.abs().float() * weight_DF.float().norm(dim=0)
        layer.num_units += unit_NF.numel()
        layer.num_zeros += int((unit_NF == 0).sum())
        if self.is_trying and len(unit_NF):
            _try(layer, unit_NF.float(), length_NF, weight_DF.float())
        is_left_out_NF = length_NF <= layer.threshold
        layer.num_left_out += int(is_left_out_NF.sum())
        return torch.where(is_left_out_NF, 0, unit_NF).view_as(unit)


def _try(layer: _Layer, unit_NF: Tensor, length_NF: Tensor, weight_DF: Tensor) -> None:
    """Add what candidate thresholds leave out of some rows."""
    if layer.candidate_Q is None:
        layer.candidate_Q = length_NF.flatten().sort().values[[int(q * (length_NF.numel() - 1)) for q in QUANTILES]]
    whole_N = linear(unit_NF, weight_DF).norm(dim=1).clamp_min(1e-20)
    for place, candidate in enumerate(layer.candidate_Q):
        tail_ND = linear(torch.where(length_NF <= candidate, unit_NF, 0), weight_DF)
        layer.cett_Q[place] += (tail_ND.norm(dim=1) / whole_N).sum()
    layer.num_rows += len(unit_NF)


@contextmanager
def _watched(model: nn.Module) -> Iterator[tuple[list[_Layer], _DownProducts]]:
    """Within, products with down matrices are seen."""
    layers, layer_of = [], {}
    for weight, unit_bytes in _down_matrices(model):
        layers.append(_Layer(unit_bytes))
        layer_of[weight.untyped_storage().data_ptr()] = layers[-1]
    with _DownProducts(layer_of) as mode, torch.no_grad():
        yield layers, mode


def _down_matrices(model: nn.Module) -> list[tuple[Tensor, int]]:
    """Down matrices of dense feed-forwards and of banks of experts, and bytes of a unit, in the order of the model.

    Raises:
        ValueError: if there is none that is found, or experts multiply by transposed matrices.
    """
    found = []
    banks = {id(module) for module in experts_modules(model).values()}
    for name, module in model.named_modules():
        if id(module) in banks:
            if getattr(module, "is_transposed", False):
                raise ValueError(
                    f"{name}: {type(module).__name__} holds its matrices transposed, which is not read yet"
                )
            weight = getattr(module, weight_names(module)[1])
            found.append((weight, (3 if module.has_gate else 2) * _column_bytes(weight)))
        elif name.rpartition(".")[2] in DOWN_NAMES and isinstance(getattr(module, "weight", None), Tensor):
            parts = _matrices_beside(model.get_submodule(name.rpartition(".")[0]), module.weight.shape[1])
            found.append((module.weight, parts * _column_bytes(module.weight)))
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no feed-forward that is known here; its down matrix must be one of "
            f"{', '.join(DOWN_NAMES)}, or the model have experts behind transformers' interface"
        )
    return found


def _column_bytes(weight: Tensor) -> int:
    """Of a matrix [.., D, F]."""
    return int(weight.shape[-2]) * weight.dtype.itemsize


def _matrices_beside(module: nn.Module, num_units: int) -> int:
    """Matrices of a feed-forward that have a row or a column for each unit."""
    weights = (getattr(child, "weight", None) for child in module.children())
    return sum(isinstance(weight, Tensor) and weight.dim() == 2 and num_units in weight.shape for weight in weights)


def unit_sparsity(
    model: nn.Module,
    sequences: Sequence[Sequence[int]],
    *,
    allowed: float = 0.01,
    progress: Callable[[float], None] = lambda share: None,
) -> UnitSparsity:
    """Measure zeros and PPL-p % sparsity.

    Args:
        model: in memory, in eval mode, with experts implementation `eager`.
        sequences: token ids; the first one also sets the thresholds.
        allowed: how much perplexity may rise, above 0.
        progress: told which share is done, 0..1.

    Raises:
        ValueError: if the model's feed-forwards cannot be found, or a sequence has fewer than two tokens.
    """
    if not sequences or min(map(len, sequences)) < 2:
        raise ValueError("unit sparsity needs sequences of at least two tokens")
    if not allowed > 0:
        raise ValueError(f"perplexity must be allowed to rise by more than 0; got {allowed}")
    with _watched(model) as (layers, mode):
        mode.is_trying = True
        _loss(model, sequences[:1])
        mode.is_trying = False
        used = [layer for layer in layers if layer.candidate_Q is not None]

        def measure(cett: float) -> tuple[float, float]:
            for layer in used:
                layer.reset()
                layer.threshold = layer.threshold_at(cett)
            loss = _loss(model, sequences)
            units = sum(layer.num_units for layer in used)
            return loss, sum(layer.num_left_out for layer in used) / max(units, 1)

        loss, least = measure(0.0)
        zeros = [layer.num_zeros / max(layer.num_units, 1) for layer in used]
        low, high, best = 0.0, 1.0, (loss, least)
        for halving in range(HALVINGS):
            progress((halving + 1) / (HALVINGS + 1))
            found = measure(middle := (low + high) / 2)
            if found[0] <= loss + math.log1p(allowed):
                low, best = middle, found
            else:
                high = middle
    return UnitSparsity(
        zeros_L=zeros,
        unit_bytes_L=[layer.unit_bytes for layer in used],
        allowed=allowed,
        perplexity=math.exp(loss),
        sparse_perplexity=math.exp(best[0]),
        sparsity=best[1],
        tokens=sum(len(sequence) - 1 for sequence in sequences),
    )


def _loss(model: Any, sequences: Sequence[Sequence[int]]) -> float:
    """Nats per token."""
    total = tokens = 0.0
    for sequence in sequences:
        ids_1S = torch.tensor([list(sequence)])
        logits_SV = model(ids_1S, use_cache=False).logits[0, :-1].float()
        total += float(cross_entropy(logits_SV, ids_1S[0, 1:], reduction="sum"))
        tokens += len(sequence) - 1
    return total / tokens


def open_eager(folder: Path) -> Any:
    """A whole model in memory, whose experts are computed by transformers' loop over them.

    Raises:
        ValueError: for a GGUF file, or a folder that transformers does not load.
    """
    if is_gguf(folder):
        raise ValueError(f"model {folder}: hidden units are watched in safetensors models only")
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto", experts_implementation="eager").eval()

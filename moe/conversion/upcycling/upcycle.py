"""`expertier upcycle`: a dense checkpoint written as a mixture of experts, one tensor at a time.

Shapes: E experts, D model width, F expert width.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig

from ...parts.text import carry_text_files
from ..flags import flag
from ..opening import read_config
from ..source import Source, meta_model
from ..staging import staged_folder
from ..tensor_files import PlannedTensor, write_tensors
from .copies import KINDS, SHARED, Copies, Difference
from .targets import IDLE_WIDTH, ExpertSizes, target_of


@dataclass(frozen=True, kw_only=True)
class UpcyclePlan:
    """What to make of a dense model.

    Args:
        copies: of each feed-forward.
        top_k: copies that a token visits.
        granularity: shards of each copy; each becomes an expert, and a token visits `granularity` as many.
        to: the family to write, or `auto`.
        noise, drop, router_std, seed: see `Difference`.

    Raises:
        ValueError: if a token is to visit more copies than there are.
    """

    copies: int = flag("Copies of each feed-forward.", name="experts", min=2)
    top_k: int = flag("Copies that a token visits.", min=1)
    granularity: int = flag("Cut each copy into so many experts, and visit so many times as many.", default=1, min=1)
    to: str = flag("auto, mixtral, qwen2_moe, qwen3_moe or expertier.", default="auto")
    noise: float = flag("Noise on each copy, relative to its weights' deviation.", default=0.0, min=0.0)
    drop: float = flag("Share of each copy's hidden channels that start anew.", default=0.0, min=0.0, max=1.0)
    router_std: float = flag("Standard deviation of the router's weights.", default=0.02, min=0.0)
    seed: int = flag("Of the router, the noise and what starts anew.", default=0, min=0)

    def __post_init__(self) -> None:
        if self.top_k > self.copies:
            raise ValueError(f"a token cannot visit {self.top_k} of {self.copies} experts; lower --top-k")

    @property
    def difference(self) -> Difference:
        """What makes the copies differ."""
        return Difference(noise=self.noise, drop=self.drop, router_std=self.router_std, seed=self.seed)


def upcycle(
    folder: Path, out: Path, plan: UpcyclePlan, advance: Callable[[int, int], None] = lambda done, total: None
) -> dict[str, Any]:
    """Write a dense checkpoint as a mixture of experts; in memory are a few of its matrices.

    Without noise and without channels that start anew, the new model computes what the dense one computes.

    Args:
        folder: a dense checkpoint: llama, mistral, qwen2 or qwen3.
        out: folder to write; appears whole or not at all.
        plan: copies, top-k, granularity, and what makes the copies differ.
        advance: is told how many bytes are written, of how many.

    Returns:
        The family, its sizes, parameters of both models, and whether the new one computes the same.

    Raises:
        ValueError: if the model is of another kind, its width does not divide, or files are damaged.
    """
    upcycling = _Upcycling(folder, plan)
    planned = list(upcycling.tensors())
    with staged_folder(out) as unfinished:
        upcycling.config.save_pretrained(unfinished)
        write_tensors(unfinished, planned, advance)
        Source(unfinished, meta_model(upcycling.target.model_class, upcycling.config))
        carry_text_files(folder, unfinished)
    return upcycling.report(planned)


class _Upcycling:
    def __init__(self, folder: Path, plan: UpcyclePlan) -> None:
        dense = read_config(folder)
        self.family, self.target = target_of(dense, plan.to)
        self.plan, self.sizes = plan, _sizes(dense.intermediate_size, plan)
        self.config: PreTrainedConfig = self.target.config(dense, self.sizes)
        self.config.architectures = [self.target.model_class.__name__]
        skeleton = meta_model(AutoModelForCausalLM._model_mapping[type(dense)], dense)
        self.shapes = {name: tuple(value.shape) for name, value in skeleton.state_dict().items()}
        self.source = Source(folder, skeleton)
        self.dtype = self.source.read("model.embed_tokens.weight").dtype
        self.copies = Copies(self._dense_matrix, plan.granularity, plan.difference)

    def tensors(self) -> Iterator[PlannedTensor]:
        """Everything outside the feed-forwards as it is, then the layers' experts and routers."""
        for name, shape in self.shapes.items():
            if ".mlp." not in name and name in self.source:
                yield self._planned(name, shape, lambda name=name: [self.source.read(name)])
        for layer in range(self.config.num_hidden_layers):
            yield from self._layer(layer)

    def report(self, planned: list[PlannedTensor]) -> dict[str, Any]:
        """What was written, in numbers."""
        experts = sum(prod(tensor.shape) for tensor in planned if ".experts." in tensor.name)
        parameters = sum(prod(tensor.shape) for tensor in planned)
        return {
            "family": self.family,
            "num_experts": self.sizes.num_experts,
            "num_experts_per_tok": self.sizes.top_k,
            "expert_width": self.sizes.width,
            "parameters": parameters,
            "active_parameters": parameters - experts + experts * self.sizes.top_k // self.sizes.num_experts,
            "dense_parameters": sum(prod(shape) for name, shape in self.shapes.items() if name in self.source),
            "bytes": sum(tensor.nbytes for tensor in planned),
            "computes_the_same": not self.plan.noise and not self.plan.drop,
        }

    def _dense_matrix(self, layer: int, kind: str) -> Tensor:
        return self.source.read(f"model.layers.{layer}.mlp.{kind}_proj.weight").to(self.dtype)

    def _planned(self, name: str, shape: tuple[int, ...], pieces: Callable[[], Any]) -> PlannedTensor:
        return PlannedTensor(name, shape, self.dtype, lambda: (piece.to(self.dtype) for piece in pieces()))

    def _layer(self, layer: int) -> Iterator[PlannedTensor]:
        E, D, F = self.sizes.num_experts, self.config.hidden_size, self.sizes.width
        block = self.target.block.format(layer=layer)
        yield self._planned(
            block + self.target.router, (E, D), lambda: [self.copies.router_rows(layer, E, D, self.dtype)]
        )
        if self.target.matrices is None:
            yield self._planned(
                f"{block}experts.gate_up_proj",
                (E, 2 * F, D),
                lambda: (self.copies.matrix(layer, e, kind) for e in range(E) for kind in ("gate", "up")),
            )
            yield self._planned(
                f"{block}experts.down_proj",
                (E, D, F),
                lambda: (self.copies.matrix(layer, e, "down") for e in range(E)),
            )
        else:
            yield from self._separate_experts(layer, block, self.target.matrices)
        if self.target.has_shared_expert:
            yield from self._idle_expert(layer, block)

    def _separate_experts(self, layer: int, block: str, names: tuple[str, str, str]) -> Iterator[PlannedTensor]:
        D, F = self.config.hidden_size, self.sizes.width
        for kind, name in zip(KINDS, names, strict=True):
            for expert in range(self.sizes.num_experts):
                make = partial(self.copies.matrix, layer, expert, kind)
                shape = (D, F) if kind == "down" else (F, D)
                yield self._planned(f"{block}experts.{expert}.{name}.weight", shape, lambda make=make: [make()])

    def _idle_expert(self, layer: int, block: str) -> Iterator[PlannedTensor]:
        """A shared expert whose down projection is 0: it adds nothing, and training can give it something to do."""
        D = self.config.hidden_size
        shapes = {"gate_proj": (IDLE_WIDTH, D), "up_proj": (IDLE_WIDTH, D), "down_proj": (D, IDLE_WIDTH)}
        for place, (name, shape) in enumerate(shapes.items()):
            std = 0.0 if name == "down_proj" else self.config.initializer_range
            yield self._planned(
                f"{block}shared_expert.{name}.weight",
                shape,
                lambda shape=shape, place=place, std=std: [self._normal(layer, place, shape, std)],
            )
        yield self._planned(f"{block}shared_expert_gate.weight", (1, D), lambda: [torch.zeros(1, D)])

    def _normal(self, layer: int, place: int, shape: tuple[int, ...], std: float) -> Tensor:
        return torch.randn(shape, generator=self.plan.difference.stream(layer, place, SHARED)) * std


def _sizes(dense_width: int, plan: UpcyclePlan) -> ExpertSizes:
    if dense_width % plan.granularity:
        raise ValueError(
            f"the feed-forwards' {dense_width} hidden channels do not divide by granularity {plan.granularity}"
        )
    return ExpertSizes(
        num_experts=plan.copies * plan.granularity,
        top_k=plan.top_k * plan.granularity,
        width=dense_width // plan.granularity,
    )

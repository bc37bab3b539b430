"""A checkpoint with other routers and the same everything else, written one tensor at a time."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from routing import ClassicRouter, ClassicRule

from ...model.decoder import MoEForCausalLM
from ...parts.config import MoEConfig
from ...parts.text import carry_text_files, token_rows
from ..layer_by_layer import SeeInput, mean_loss, streamed_experts
from ..source import OurSource, Source, meta_model
from ..staging import staged_folder
from ..tensor_files import PlannedTensor, write_tensors

ROW_LENGTH = 512
"""Tokens of one sequence of a text; not tuned."""


def softmax_rule(source: OurSource) -> ClassicRule:
    """The rule of a model's routers, if they are linear, softmax and without anything that moves choices.

    Raises:
        ValueError: if they are not; the message says what they are.
    """
    router = meta_model(MoEForCausalLM, source.config).model.moe_layers[0].router
    if type(router) is not ClassicRouter:
        raise ValueError(f"expected plain softmax routers; this model's are {type(router).__name__}")
    rule = router.rule
    found = {
        "sigmoid scores": rule.scoring.score == "sigmoid",
        "groups of experts": rule.grouping.num_groups > 1,
        "a balancing bias": bool(rule.balance.bias_rate),
        "jitter": bool(rule.scoring.jitter),
        "capacities": rule.capacity.capacity_factor is not None,
        "zero-compute experts": bool(source.config.zero_compute_experts),
    }
    if odd := [what for what, is_there in found.items() if is_there]:
        raise ValueError(f"expected plain softmax routers; this model's have {', '.join(odd)}")
    return rule


def changed_config(source: OurSource, changes: Mapping[str, object]) -> MoEConfig:
    """The model's config with other routers."""
    settings = source.config.to_dict() | dict(changes)
    config = MoEConfig(**{name: value for name, value in settings.items() if name != "model_type"})
    config.architectures = [MoEForCausalLM.__name__]
    return config


def write_regated(
    source: OurSource,
    config: MoEConfig,
    gates: Mapping[str, Tensor],
    out: Path,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Write a checkpoint of ours: the source's tensors but for its gates.

    Args:
        source: what everything but gates is read from.
        config: of the model that is written.
        gates: every tensor of the new routers, by name.
        out: folder to write; appears whole or not at all.
        advance: is told how many bytes are written, of how many.
    """
    kept = [name for name in source.shapes if ".mlp.router." not in name and name in source]
    dtype = source.read(kept[0]).dtype
    planned = [PlannedTensor(n, source.shapes[n], dtype, lambda n=n: [source.read(n).to(dtype)]) for n in kept]
    planned += [PlannedTensor(n, tuple(t.shape), dtype, lambda t=t: [t.to(dtype)]) for n, t in gates.items()]
    with staged_folder(out) as unfinished:
        config.save_pretrained(unfinished)
        write_tensors(unfinished, planned, advance)
        Source(unfinished, meta_model(MoEForCausalLM, config))
        carry_text_files(source.folder, unfinished, vocab_size=config.vocab_size if source.is_ours else None)


def gate_name(config: MoEConfig, layer: int, part: str = "weight") -> str:
    """The name of a tensor of a MoE layer's router."""
    return f"model.layers.{config.num_dense_layers + layer}.mlp.router.{part}"


@contextmanager
def streamed(
    source: OurSource, config: MoEConfig, gates: Mapping[str, Tensor], see: SeeInput | None = None
) -> Iterator[MoEForCausalLM]:
    """A model with these routers and the source's other tensors, whose experts are in memory layer by layer."""
    model = meta_model(MoEForCausalLM, config).eval()
    state = {name: value for name, value in source.resident().items() if ".mlp.router." not in name} | dict(gates)
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    with streamed_experts(model, source.experts, see):
        yield model


def own_gates(source: OurSource) -> dict[str, Tensor]:
    """Every tensor of the model's own routers."""
    return {name: source.read(name) for name in source.shapes if ".mlp.router." in name}


def loss_on(source: OurSource, config: MoEConfig, gates: Mapping[str, Tensor], token_BS: Tensor) -> float:
    """Nats per token with these routers."""
    with streamed(source, config, gates) as model:
        return mean_loss(model, token_BS)


def rows_of(source: OurSource, text: Path, tokens: int) -> Tensor:
    """int64 [B, S] from the start of a text."""
    length = min(ROW_LENGTH, source.config.max_position_embeddings)
    return token_rows(source.folder, source.config.vocab_size, [text], length, tokens)


def dtype_of(source: OurSource) -> torch.dtype:
    """The dtype of the model's gates."""
    return source.read(gate_name(source.config, 0)).dtype

"""What a checkpoint's folder says about its experts, read from file headers alone: no weights, no torch.

Shapes: L MoE layers.
"""

import json
import re
import struct
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

HEADER_BYTES = 100 << 20  # the format's own limit for a header
# model.layers.3.mlp.experts.7.down_proj.weight, or ...experts.gate_up_proj with all experts of the layer in one tensor
_EXPERT = re.compile(r"(?:^|\.)layers\.(\d+)\..*?\bexperts\.(\d+)\.")
_BANK = re.compile(r"(?:^|\.)layers\.(\d+)\..*?\bexperts\.\w+")


@dataclass(frozen=True, kw_only=True)
class ModelExperts:
    """Experts of a checkpoint.

    Args:
        layer_ids: decoder layers that have experts.
        experts_per_layer: how many each has.
        expert_bytes: stored bytes of one expert of each layer, scales included.
        top_k: experts per token as the config says, or None.
        hidden_layers: decoder layers in all as the config says, or None.
    """

    layer_ids: tuple[int, ...]
    experts_per_layer: tuple[int, ...]
    expert_bytes: tuple[float, ...]
    top_k: int | None
    hidden_layers: int | None


def read_model_experts(folder: str | Path) -> ModelExperts:
    """Sizes and numbers of the experts in a folder of safetensors.

    Raises:
        ValueError: if there are no such files, one is damaged, or no tensor belongs to experts.
    """
    root = Path(folder)
    files = sorted(root.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{root}: no *.safetensors files; give the folder of a checkpoint, or --expert-size")
    size: dict[int, int] = defaultdict(int)
    named: dict[int, set[int]] = defaultdict(set)
    banked: dict[int, int] = {}
    for file in files:
        for name, (shape, count) in _tensors(file).items():
            if (one := _EXPERT.search(name)) is not None:
                size[int(one[1])] += count
                named[int(one[1])].add(int(one[2]))
            elif (bank := _BANK.search(name)) is not None and shape:
                size[int(bank[1])] += count
                banked[int(bank[1])] = shape[0]
    if not size:
        raise ValueError(f"{root}: no tensor is named like ...layers.N....experts....; give --expert-size")
    layers = sorted(size)
    experts = tuple(len(named[layer]) or banked[layer] for layer in layers)
    config = _config(root)
    return ModelExperts(
        layer_ids=tuple(layers),
        experts_per_layer=experts,
        expert_bytes=tuple(size[layer] / count for layer, count in zip(layers, experts, strict=True)),
        top_k=_first(config, ("num_experts_per_tok", "moe_topk", "moe_top_k", "num_selected_experts", "moe_k")),
        hidden_layers=_first(config, ("num_hidden_layers",)),
    )


def _tensors(file: Path) -> dict[str, tuple[list[int], int]]:
    """Shape and bytes of each tensor of a file."""
    try:
        with file.open("rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
            if length > min(HEADER_BYTES, file.stat().st_size):
                raise ValueError("the header is longer than the file")
            header = json.loads(opened.read(length))
        return {
            name: ([int(n) for n in entry["shape"]], int(entry["data_offsets"][1]) - int(entry["data_offsets"][0]))
            for name, entry in header.items()
            if name != "__metadata__"
        }
    except (struct.error, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(f"{file}: not a safetensors file: {error}") from None


def _config(root: Path) -> dict[str, object]:
    file = root / "config.json"
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: not JSON: {error}") from None
    inner = value.get("text_config") if isinstance(value, dict) else None
    return {**value, **inner} if isinstance(inner, dict) else value if isinstance(value, dict) else {}


def _first(config: dict[str, object], names: tuple[str, ...]) -> int | None:
    return next((value for name in names if isinstance(value := config.get(name), int)), None)

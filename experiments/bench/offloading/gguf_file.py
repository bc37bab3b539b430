"""A replay checkpoint as a GGUF file, for llama.cpp: the same codes and scales in the blocks of ggml.

GGUF has a type for three of the forms. BF16 and MXFP4 hold the very numbers of `plain` and `mxfp4`. Q4_0 holds the
codes and scales of `int4`; compressed-tensors rounds their product to bfloat16, and llama.cpp does not. FP8 in blocks
of 128 x 128 has no type, and any other type would be other numbers.

Shapes: E experts, R rows of a matrix, G groups of 32 columns, B bytes of a group, W words of 32 bits.

Source: ggml's block types; tensor names of the PyPI package `gguf`, as llama.cpp's converter uses them.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...evidence.replay import form_of

GROUP = 32
"""Columns of a block, in each type of four bits."""
ROUTER = "ffn_gate_inp"
"""A matrix that is float32 in GGUF, as vectors are."""
PARTS = ("gate", "up", "down")
TYPES: Mapping[str, str] = {"plain": "BF16", "mxfp4": "MXFP4", "int4": "Q4_0"}
"""Stored form -> type of ggml with the same codes and scales."""
NOTES: Mapping[str, str] = {
    "fp8": "GGUF has no type for blocks of FP8; another type would be other numbers",
    "int4": "Q4_0: the same codes and scales, products not rounded to bfloat16",
}
"""What has to be said of llama.cpp beside the others, by stored form."""
ARCHITECTURES: Mapping[str, str] = {"olmoe": "olmoe", "gpt_oss": "gpt-oss"}
"""What ggml calls the families of replay checkpoints."""
Stored = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of the file.

    Args:
        name: in GGUF.
        kind: name of its type in ggml.
        shape: of its bytes, rows last but one.
        read: gives the bytes.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    read: Stored


def gguf_of(checkpoint: Path) -> Path:
    """The GGUF file in a replay checkpoint's folder, written when it is not there or older, one tensor at a time.

    Raises:
        ValueError: if GGUF has no type for the form of its experts.
    """
    from gguf import GGMLQuantizationType, GGUFWriter

    form = form_of(checkpoint)
    if form not in TYPES:
        raise ValueError(NOTES[form])
    file, unfinished = checkpoint / "model.gguf", checkpoint / "model.gguf.partial"
    index = checkpoint / "model.safetensors.index.json"
    if file.is_file() and file.stat().st_mtime >= index.stat().st_mtime:
        return file
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    writer = GGUFWriter(unfinished, ARCHITECTURES[config["model_type"]])
    _describe(writer, config)
    tensors = list(_tensors(checkpoint, config, form))
    for tensor in tensors:
        nbytes, kind = int(np.prod(tensor.shape)), GGMLQuantizationType[tensor.kind]
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.uint8), nbytes, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        writer.write_tensor_data(tensor.read().contiguous().view(torch.uint8).reshape(tensor.shape).numpy())
    writer.close()
    return unfinished.replace(file)


def q4_blocks(code_ERGB: torch.Tensor, scale_ERGB: torch.Tensor) -> torch.Tensor:
    """Blocks of ggml's types of four bits: a scale, then codes 0 to 15 in low nibbles and 16 to 31 in high ones.

    Args:
        code_ERGB: uint8 [E, R, G, 16]; byte b has column 2 b of its group in the low nibble, 2 b + 1 in the high one.
        scale_ERGB: uint8 [E, R, G, 1 or 2], the bytes of each group's scale.

    Returns:
        uint8 [E, R, 17 or 18 G].
    """
    column = torch.stack([code_ERGB & 15, code_ERGB >> 4], dim=-1).flatten(-2)
    nibbles = column[..., :16] | column[..., 16:] << 4
    return torch.cat([scale_ERGB, nibbles], dim=-1).flatten(-2)


def _mxfp4(code_ERGB: torch.Tensor, exponent_ERG: torch.Tensor) -> torch.Tensor:
    return q4_blocks(code_ERGB, exponent_ERG[..., None])


def _q4_0(word_ERW: torch.Tensor, scale_ERG: torch.Tensor) -> torch.Tensor:
    """Raises ValueError if float16 lacks a scale; it may below 2^-14 and above 65504."""
    half_ERG = scale_ERG.half()
    if not torch.equal(half_ERG.to(scale_ERG.dtype), scale_ERG):
        raise ValueError("a scale of these experts is no float16, as those of Q4_0 have to be")
    codes, scales = word_ERW.view(torch.uint8), half_ERG.view(torch.uint8)
    return q4_blocks(codes.unflatten(-1, (-1, 16)), scales.unflatten(-1, (-1, 2)))


def _describe(writer: Any, config: dict[str, Any]) -> None:
    rope = config["rope_parameters"]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    if config["model_type"] == "olmoe":
        writer.add_expert_count(config["num_experts"])
    else:
        _describe_gpt_oss(writer, config, rope)


def _describe_gpt_oss(writer: Any, config: dict[str, Any], rope: dict[str, Any]) -> None:
    from gguf import RopeScalingType

    writer.add_expert_count(config["num_local_experts"])
    writer.add_expert_feed_forward_length(config["intermediate_size"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_sliding_window(config["sliding_window"])
    writer.add_rope_scaling_type(RopeScalingType(rope["rope_type"]))
    writer.add_rope_scaling_factor(rope["factor"])
    writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])


def _tensors(checkpoint: Path, config: dict[str, Any], form: str) -> Iterator[GgufTensor]:
    import gguf

    numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    num_layers = config["num_hidden_layers"]
    names = gguf.get_tensor_name_map(numbers[ARCHITECTURES[config["model_type"]]], num_layers)
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text(encoding="utf-8"))["weight_map"]
    shards = _Shards(checkpoint, index)
    for theirs in (name for name in index if ".experts." not in name):
        # sinks are the one tensor without a suffix
        base, suffix = theirs.rsplit(".", 1) if theirs.endswith((".weight", ".bias")) else (theirs, "weight")
        stored, shape = f"{names[base]}.{suffix}", shards.shape(theirs)
        kind = "F32" if len(shape) == 1 or ROUTER in stored else "BF16"
        yield _plain(stored, kind, shape, shards.reader(theirs, is_wide=kind == "F32"))
    experts = _fused_experts if config["model_type"] == "gpt_oss" else _single_experts
    for layer in range(num_layers):
        yield from experts(shards, layer, config, TYPES[form])


def _plain(name: str, kind: str, shape: tuple[int, ...], read: Stored) -> GgufTensor:
    return GgufTensor(name, kind, (*shape[:-1], shape[-1] * (4 if kind == "F32" else 2)), read)


def _single_experts(shards: "_Shards", layer: int, config: dict[str, Any], kind: str) -> Iterator[GgufTensor]:
    """Experts that the checkpoint stores one by one."""
    count, hidden, inner = config["num_experts"], config["hidden_size"], config["intermediate_size"]
    for part in PARTS:
        prefixes = [f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj." for expert in range(count)]
        rows, columns = (hidden, inner) if part == "down" else (inner, hidden)
        name = f"blk.{layer}.ffn_{part}_exps.weight"
        if kind == "BF16":
            yield _plain(name, kind, (count, rows, columns), shards.reader(*(f"{each}weight" for each in prefixes)))
            continue
        codes, scales = (shards.reader(*(each + end for each in prefixes)) for end in ("weight_packed", "weight_scale"))
        yield GgufTensor(name, kind, (count, rows, columns // GROUP * 18), partial(_joined, _q4_0, codes, scales))


def _fused_experts(shards: "_Shards", layer: int, config: dict[str, Any], kind: str) -> Iterator[GgufTensor]:
    """Experts of gpt-oss, in whose first matrix rows of gate and up take turns."""
    count, hidden, inner = config["num_local_experts"], config["hidden_size"], config["intermediate_size"]
    for part in PARTS:
        fused, every = ("down", slice(None)) if part == "down" else ("gate_up", slice(PARTS.index(part), None, 2))
        rows, columns = (hidden, inner) if part == "down" else (inner, hidden)
        prefix, name = f"model.layers.{layer}.mlp.experts.{fused}_proj_", f"blk.{layer}.ffn_{part}_exps"
        codes, scales = (shards.reader(f"{prefix}{end}", every=every) for end in ("blocks", "scales"))
        shape = (count, rows, columns // GROUP * 17)
        yield GgufTensor(f"{name}.weight", kind, shape, partial(_joined, _mxfp4, codes, scales))
        yield _plain(f"{name}.bias", "F32", (count, rows), shards.reader(f"{prefix}bias", is_wide=True, every=every))


def _joined(join: Callable[..., torch.Tensor], codes: Stored, scales: Stored) -> torch.Tensor:
    return join(codes(), scales())


class _Shards:
    """The tensors of a checkpoint, each read when it is asked for."""

    def __init__(self, checkpoint: Path, index: dict[str, str]) -> None:
        self._checkpoint, self._index = checkpoint, index

    def shape(self, name: str) -> tuple[int, ...]:
        from safetensors import safe_open

        with safe_open(self._checkpoint / self._index[name], framework="pt") as file:
            return tuple(file.get_slice(name).get_shape())

    def reader(self, *names: str, is_wide: bool = False, every: slice = slice(None)) -> Stored:
        """Reads tensors of one file, several as one, by their names.

        Args:
            is_wide: whether they become float32.
            every: which rows of the second dimension.
        """

        def read() -> torch.Tensor:
            from safetensors import safe_open

            with safe_open(self._checkpoint / self._index[names[0]], framework="pt") as file:
                found = [file.get_tensor(name) for name in names]
            tensor = found[0] if len(found) == 1 else torch.stack(found)
            tensor = tensor if every == slice(None) else tensor[:, every].contiguous()
            return tensor.float() if is_wide else tensor

        return read

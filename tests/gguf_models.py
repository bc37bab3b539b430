"""Tiny GGUF models, written by the `gguf` package, with the plain models that they stand for."""

import re

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind

NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.sinks": "attn_sinks.weight",
    "mlp.gate.weight": "ffn_gate_inp.weight",
    "mlp.router": "ffn_gate_inp",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
}
"""Names in a model and in a GGUF file; without the layer, where there is one."""
SCALES = {
    **dict.fromkeys(("IQ4_NL", "IQ4_XS", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ1_S"), (0,)),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
}
"""Where the float16 scales of a block are, of types that the package reads and does not write."""
QUANTISED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4", "TQ1_0", "TQ2_0")
"""Types that the package writes."""


def blocks(kind, values_FD, rng):
    """Stored bytes of a matrix: its values where the package can write the type, else random codes of small values."""
    if kind in ("F32", "F16"):
        return values_FD.astype({"F32": np.float32, "F16": np.float16}[kind])
    if kind in QUANTISED or kind == "BF16":
        return gguf.quants.quantize(values_FD, Kind[kind])
    size, nbytes = gguf.GGML_QUANT_SIZES[Kind[kind]]
    stored = rng.integers(0, 256, (*values_FD.shape[:-1], values_FD.shape[-1] // size, nbytes), dtype=np.uint8)
    for place in SCALES[kind]:
        scale = rng.uniform(1e-5, 1e-4, stored.shape[:-1]).astype(np.float16)
        stored[..., place : place + 2] = scale[..., None].view(np.uint8)
    return stored.reshape(*values_FD.shape[:-1], -1)


def numbers(kind, stored):
    return torch.from_numpy(gguf.quants.dequantize(stored, Kind[kind]).copy())


def gguf_name(name):
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    rest = name[layer.end() :] if layer else name
    found = next((ours for theirs, ours in NAMES.items() if rest == theirs), None)
    if found is None:
        base, suffix = rest.rsplit(".", 1)
        found = f"{NAMES[base]}.{suffix}"
    return f"blk.{layer[1]}.{found}" if layer else found


def permuted(values_FD, heads):
    """Rows of queries or keys as the converter stores those of llama: rotated pairs side by side."""
    half = len(values_FD) // heads // 2
    return values_FD.reshape(heads, 2, half, -1).swapaxes(1, 2).reshape(values_FD.shape)


def unpermuted(values_FD, heads):
    half = len(values_FD) // heads // 2
    return values_FD.reshape(heads, half, 2, -1).swapaxes(1, 2).reshape(values_FD.shape)


class TinyGguf:
    """A GGUF file that is being made of a model, and the model's weights as the file holds them.

    Args:
        model: a transformers model with float32 weights.
        architecture: name in ggml.
        kind_of: GGUF name -> name of its type.
        seed: of random codes.
    """

    def __init__(self, model, architecture, kind_of, seed=0):
        self.architecture, self.kind_of = architecture, kind_of
        self.rng = np.random.default_rng(seed)
        self.tensors, self.state = {}, {}
        config = model.config
        self.heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
        for name, value in model.state_dict().items():
            if ".experts." in name:
                self._add_experts(name, value.float().numpy())
            elif name != "lm_head.weight" or not config.tie_word_embeddings:
                self._add(name, value.float().numpy())
        if config.tie_word_embeddings:
            self.state["lm_head.weight"] = self.state["model.embed_tokens.weight"]

    def _store(self, name, values):
        kind = "F32" if values.ndim == 1 else self.kind_of(name)
        self.tensors[name] = (kind, blocks(kind, values, self.rng))
        return numbers(kind, self.tensors[name][1])

    def _add(self, name, values):
        stored = gguf_name(name)
        if self.architecture == "gpt-oss":
            stored = stored.replace("ffn_norm", "post_attention_norm")
        heads = next((count for part, count in self.heads.items() if f".{part}." in stored), None)
        if self.architecture == "llama" and heads:
            found = self._store(stored, permuted(values, heads)).numpy()
            self.state[name] = torch.from_numpy(unpermuted(found, heads).copy())
        elif "ffn_gate_inp_shexp" in stored:
            self.state[name] = self._store(stored, values[0])[None]
        else:
            self.state[name] = self._store(stored, values)

    def _add_experts(self, name, values):
        layer = name.split(".")[2]
        if self.architecture == "gpt-oss":
            self.state[name] = self._alternating(f"blk.{layer}.ffn_", name.rsplit(".", 1)[1], values)
        elif name.endswith("down_proj"):
            self.state[name] = self._store(f"blk.{layer}.ffn_down_exps.weight", values)
        else:
            gate, up = np.split(values, 2, axis=1)
            halves = [
                self._store(f"blk.{layer}.ffn_{part}_exps.weight", half) for part, half in (("gate", gate), ("up", up))
            ]
            self.state[name] = torch.cat(halves, dim=1)

    def _alternating(self, prefix, parameter, values):
        """Experts of gpt-oss: inputs are rows, and outputs of gate and up alternate; files have neither."""
        suffix = "bias" if parameter.endswith("_bias") else "weight"
        values = values if suffix == "bias" else values.swapaxes(1, 2)
        parts = {"gate": values[:, ::2], "up": values[:, 1::2]} if "gate_up" in parameter else {"down": values}
        found = []
        for part, one in parts.items():
            stored, kind = f"{prefix}{part}_exps.{suffix}", "F32"
            if suffix == "weight":
                kind = self.kind_of(stored)
            self.tensors[stored] = (kind, blocks(kind, np.ascontiguousarray(one), self.rng))
            found.append(numbers(kind, self.tensors[stored][1]))
        whole = found[0] if len(found) == 1 else torch.stack(found, dim=2).flatten(1, 2)
        return whole if suffix == "bias" else whole.transpose(1, 2).contiguous()

    def write(self, path, metadata, **writing):
        """The file, or its parts if `split_max_tensors` says so."""
        writer = gguf.GGUFWriter(path, self.architecture, **writing)
        for key, value in metadata.items():
            key = key.replace("ARCH", self.architecture)
            if isinstance(value, list):
                writer.add_array(key, value)
            elif isinstance(value, str):
                writer.add_string(key, value)
            elif isinstance(value, bool):
                writer.add_bool(key, value)
            else:
                (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(key, value)
        for name, (kind, stored) in self.tensors.items():
            writer.add_tensor(name, stored, raw_dtype=Kind[kind])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path


def metadata_of(config):
    """What llama.cpp's converter writes for a config of the Qwen and llama families."""
    found = {
        "ARCH.block_count": config.num_hidden_layers,
        "ARCH.context_length": config.max_position_embeddings,
        "ARCH.embedding_length": config.hidden_size,
        "ARCH.feed_forward_length": config.intermediate_size,
        "ARCH.attention.head_count": config.num_attention_heads,
        "ARCH.attention.head_count_kv": config.num_key_value_heads,
        "ARCH.attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "ARCH.rope.freq_base": float(config.rope_parameters["rope_theta"]),
    }
    if config.rope_parameters["rope_type"] == "yarn":
        found["ARCH.rope.scaling.type"] = "yarn"
        found["ARCH.rope.scaling.factor"] = float(config.rope_parameters["factor"])
        original = config.rope_parameters["original_max_position_embeddings"]
        found["ARCH.rope.scaling.original_context_length"] = original
    if getattr(config, "sliding_window", None):
        found["ARCH.attention.sliding_window"] = config.sliding_window
    for key, name in {
        "ARCH.attention.key_length": "head_dim",
        "ARCH.expert_count": "num_experts",
        "ARCH.expert_used_count": "num_experts_per_tok",
        "ARCH.expert_feed_forward_length": "moe_intermediate_size",
        "ARCH.expert_shared_feed_forward_length": "shared_expert_intermediate_size",
    }.items():
        if getattr(config, name, None):
            found[key] = getattr(config, name)
    return found

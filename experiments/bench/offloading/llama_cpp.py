"""llama.cpp as a contestant: the weights of a replay checkpoint as GGUF, mapped from disk and paged in on demand.

Needs `pip install llama-cpp-python gguf`.
"""

import ctypes
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

NORMS = {
    "attn_norm": "input_layernorm",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate_inp": "mlp.gate",
}
"""These are float32 in GGUF."""
# names in GGUF, and in the checkpoint, which shortens `output` to `o`
PRODUCTS = {f"attn_{short}": f"self_attn.{short[0]}_proj" for short in ("q", "k", "v", "output")}
NOT_INSTALLED = "llama-cpp-python and gguf are not installed"
EXPERTS = {f"ffn_{part}_exps": f"{part}_proj" for part in ("gate", "up", "down")}


def is_available() -> bool:
    """Whether llama-cpp-python and gguf are installed."""
    from importlib.util import find_spec

    return find_spec("llama_cpp") is not None and find_spec("gguf") is not None


def gguf_of(checkpoint: Path) -> Path:
    """The GGUF file in an `olmoe` checkpoint's folder, written when it is not there or older, one layer at a time."""
    from gguf import GGMLQuantizationType, GGUFWriter

    file, partial = checkpoint / "model.gguf", checkpoint / "model.gguf.partial"
    index = checkpoint / "model.safetensors.index.json"
    if file.is_file() and file.stat().st_mtime >= index.stat().st_mtime:
        return file
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    writer = GGUFWriter(partial, "olmoe")
    _describe(writer, config)
    entries = list(_tensors(checkpoint, config))
    for name, shape, is_wide, _ in entries:
        width, kind = (4, GGMLQuantizationType.F32) if is_wide else (2, GGMLQuantizationType.BF16)
        writer.add_tensor_info(name, shape, np.dtype(f"u{width}"), int(np.prod(shape)) * width, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, _, is_wide, read in entries:
        tensor = read()
        writer.write_tensor_data((tensor.float() if is_wide else tensor.view(torch.int16)).contiguous().numpy())
    writer.close()
    return partial.replace(file)


class LlamaCpp:
    """A GGUF file, running on the CPU.

    Args:
        file: its name.
        context: tokens at most, of all sequences together.
        num_threads: CPU threads for prompts and for decoding alike.
        num_sequences: conversations at most; see `together`.

    Raises:
        OSError: if llama.cpp cannot load the file.
    """

    def __init__(self, file: Path, context: int, num_threads: int, num_sequences: int = 1) -> None:
        import llama_cpp

        self._library = llama_cpp
        self._quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._quiet, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        options = llama_cpp.llama_model_default_params()
        options.use_mmap, options.n_gpu_layers = True, 0
        self._model = llama_cpp.llama_model_load_from_file(str(file).encode(), options)
        if not self._model:
            raise OSError(f"llama.cpp cannot load {file}")
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = settings.n_batch = max(context, 32)
        settings.n_threads = settings.n_threads_batch = num_threads
        settings.n_seq_max = num_sequences
        self._context = llama_cpp.llama_init_from_model(self._model, settings)
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))

    def __call__(self, ids: list[int]) -> NDArray[np.float32]:
        """Continue with these tokens; gives the logits after the last."""
        tokens = (self._library.llama_token * len(ids))(*ids)
        if self._library.llama_decode(self._context, self._library.llama_batch_get_one(tokens, len(ids))):
            raise RuntimeError("llama.cpp could not decode")
        logits = self._library.llama_get_logits_ith(self._context, -1)
        return np.ctypeslib.as_array(logits, shape=(self._vocabulary,)).copy()

    def together(self, ids: Sequence[Sequence[int]], start: int) -> None:
        """Continue several sequences in one batch, as llama-server does with its places.

        Args:
            ids: the next tokens of each sequence, as many for each.
            start: position of the first of them.
        """
        size = sum(map(len, ids))
        batch = self._library.llama_batch_init(size, 0, 1)
        batch.n_tokens = size
        places = ((sequence, at) for at in range(len(ids[0])) for sequence in range(len(ids)))
        for place, (sequence, at) in enumerate(places):
            batch.token[place], batch.pos[place] = ids[sequence][at], start + at
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, sequence
            batch.logits[place] = at == len(ids[0]) - 1
        failed = self._library.llama_decode(self._context, batch)
        self._library.llama_batch_free(batch)
        if failed:
            raise RuntimeError(f"llama.cpp could not decode {len(ids)} sequences")


def _describe(writer: Any, config: dict[str, Any]) -> None:
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_expert_count(config["num_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")


Entry = tuple[str, tuple[int, ...], bool, Callable[[], torch.Tensor]]


def _tensors(checkpoint: Path, config: dict[str, Any]) -> Iterator[Entry]:
    """Name, shape, whether float32, and how to read it."""
    width, experts = config["hidden_size"], config["num_experts"]
    inner, vocabulary = config["intermediate_size"], config["vocab_size"]
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text(encoding="utf-8"))["weight_map"]

    def read(*names: str) -> Callable[[], torch.Tensor]:
        return lambda: _read(checkpoint, index, names)

    yield "token_embd.weight", (vocabulary, width), False, read("model.embed_tokens.weight")
    yield "output_norm.weight", (width,), True, read("model.norm.weight")
    yield "output.weight", (vocabulary, width), False, read("lm_head.weight")
    for layer in range(config["num_hidden_layers"]):
        theirs = f"model.layers.{layer}."
        for name, source in NORMS.items():
            shape = (experts, width) if name == "ffn_gate_inp" else (width,)
            yield f"blk.{layer}.{name}.weight", shape, True, read(f"{theirs}{source}.weight")
        for name, source in PRODUCTS.items():
            yield f"blk.{layer}.{name}.weight", (width, width), False, read(f"{theirs}{source}.weight")
        for name, source in EXPERTS.items():
            shape = (experts, width, inner) if source == "down_proj" else (experts, inner, width)
            names = [f"{theirs}mlp.experts.{expert}.{source}.weight" for expert in range(experts)]
            yield f"blk.{layer}.{name}.weight", shape, False, read(*names)


def _read(checkpoint: Path, index: dict[str, str], names: tuple[str, ...]) -> torch.Tensor:
    from safetensors import safe_open

    with safe_open(checkpoint / index[names[0]], framework="pt") as file:
        return file.get_tensor(names[0]) if len(names) == 1 else torch.stack([file.get_tensor(name) for name in names])

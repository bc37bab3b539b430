"""Experts rounded by the quantisers of llama.cpp: the functions of ggml that `llama-quantize` calls.

A twin of the model is written. Its experts are the numbers that the blocks stand for, rounded to bfloat16, which is
what our own reader of GGUF files expands them to. So one judge compares both kinds, and arithmetic does not differ.
Everything outside the experts stays as it is, as in our own packed copies.

Needs `pip install llama-cpp-python gguf`.

Shapes: E experts, N rows of one expert, O outputs of any matrix, C its inputs, F expert width.
"""

import ctypes
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

K_COLUMNS = 256
"""Columns of a block of K-quants."""
INSTEAD = {"q2_k": "iq4_nl", "q4_k": "q5_0", "q6_k": "q8_0"}
"""What llama.cpp takes where rows are no multiple of 256 columns: `tensor_type_fallback` of its llama-quant.cpp."""


def type_for(form: str, columns: int) -> str:
    """The type of ggml that a matrix of so many columns gets."""
    return INSTEAD[form] if columns % K_COLUMNS and form in INSTEAD else form


@torch.no_grad()
def write_twin(model: Path, target: Path, form: str, inputs: Any = None) -> float:
    """Write a checkpoint whose experts are what a type of ggml makes of them.

    Args:
        model: folder of the model, in bfloat16; outputs are rows of its experts' matrices.
        target: folder to write.
        form: a type of ggml in small letters, such as `q4_k`.
        inputs: what the experts see, of `offload.calibrate`; columns then count by their mean square over an expert's
            own tokens, as in llama.cpp's importance matrix.

    Returns:
        Stored bits of a weight.
    """
    from transformers import AutoModelForCausalLM

    twin = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    stored = weights = 0
    for layer, module in enumerate(_experts(twin)):
        for expert in range(len(module.gate_up_proj)):
            x_NC = None if inputs is None else inputs.rows(layer, expert).x_NC
            # the second matrix sees what the original first one makes, as llama.cpp's recording does
            hidden_NF = None if x_NC is None else module._apply_gate(x_NC @ module.gate_up_proj[expert].float().T)
            for matrix_EOC, seen_NC in ((module.gate_up_proj, x_NC), (module.down_proj, hidden_NF)):
                w_OC = matrix_EOC.data[expert]
                rounded_OC, nbytes = rounded(w_OC.float(), form, _importance(seen_NC))
                w_OC.copy_(rounded_OC)
                stored, weights = stored + nbytes, weights + w_OC.numel()
    twin.save_pretrained(target)
    return 8 * stored / weights


def rounded(w_OC: torch.Tensor, form: str, importance_C: torch.Tensor | None) -> tuple[torch.Tensor, int]:
    """What the blocks of a matrix stand for, float32, and how many bytes they take.

    Args:
        w_OC: float32.
        form: a type of ggml in small letters.
        importance_C: float32, how much each column counts; None counts them alike.
    """
    from gguf import GGMLQuantizationType, dequantize

    rows, columns = w_OC.shape
    kind = GGMLQuantizationType[type_for(form, columns).upper()]
    source = np.ascontiguousarray(w_OC.numpy())
    weights = None if importance_C is None else np.ascontiguousarray(importance_C.numpy())
    blocks = _quantised(source, int(kind), weights)
    return torch.from_numpy(dequantize(blocks.reshape(rows, -1), kind)), blocks.nbytes


def _quantised(source: NDArray[np.float32], kind: int, weights: NDArray[np.float32] | None) -> NDArray[np.uint8]:
    library, (rows, columns) = _ggml(), source.shape
    blocks = np.empty(rows * library.ggml_row_size(kind, columns), np.uint8)
    importance = None if weights is None else weights.ctypes.data
    library.ggml_quantize_chunk(kind, source.ctypes.data, blocks.ctypes.data, 0, rows, columns, importance)
    return blocks


def _importance(seen_NC: torch.Tensor | None) -> torch.Tensor | None:
    return None if seen_NC is None or not len(seen_NC) else seen_NC.square().mean(0)


def _experts(model: Any) -> Iterator[Any]:
    """Modules of experts in the order of the layers."""
    for module in model.modules():
        if isinstance(getattr(module, "gate_up_proj", None), torch.nn.Parameter):
            yield module


@cache
def _ggml() -> ctypes.CDLL:
    from llama_cpp import _ggml as loaded

    library: ctypes.CDLL = loaded.libggml
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, count, count, count, pointer]
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_row_size.argtypes, library.ggml_row_size.restype = [ctypes.c_int, count], ctypes.c_size_t
    return library

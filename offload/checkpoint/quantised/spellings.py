"""How formats name the tensors of a quantised matrix.

Names are matched by their endings, never by a model family. Which matrices of a checkpoint are quantised is decided
matrix by matrix, by the companions that are there: lists of excluded modules differ between tools.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..tensors import TensorEntry
from .description import Quantisation
from .found import Companions, Found
from .read_bytes import bytes_of_127, scaled_bytes
from .read_integers import packed_integers, quantiles, reshaped_integers, turned_integers
from .read_nibbles import fused_blocks, packed_floats, whole_bytes

Reader = Callable[[TensorEntry, Companions, Quantisation], Found]


@dataclass(frozen=True, kw_only=True)
class Spelling:
    """One way to name a quantised matrix.

    Args:
        ending: of the codes' name; the plain tensor's name ends in `plain_ending` instead.
        plain_ending: what takes its place.
        dtypes: safetensors dtypes that the codes may have.
        needed: ending of each companion, added to the plain tensor's name; one that begins with a dot may also take the
            place of `.weight`. The first that is there counts.
        optional: the same for companions that may be missing.
        read: tells the encoding, or raises ValueError.
        is_by_shape: whether it looks at dtypes and shapes only, which thousands of experts have alike.
    """

    ending: str
    dtypes: tuple[str, ...]
    needed: Mapping[str, tuple[str, ...]]
    optional: Mapping[str, tuple[str, ...]]
    read: Reader
    plain_ending: str = ""
    is_by_shape: bool = False


HQQ_NOTES = (
    *("nbits", "quant_scale", "quant_zero", "view_as_float", "unpack_view_dtype", "channel_wise", "optimize"),
    *("round_zero", "offload_meta", "encoded_state_dict", "stores_quant_config"),
)
"""What HQQ writes beside a matrix that is said by other tensors too, or is about how it was quantised."""

SPELLINGS = (
    Spelling(ending="_blocks", dtypes=("U8",), needed={"scales": ("_scales",)}, optional={}, read=fused_blocks),
    Spelling(
        ending="_packed",
        dtypes=("I32",),
        needed={"scales": ("_scale",), "shape": ("_shape",)},
        optional={"zeros": ("_zero_point",), "order": ("_g_idx",)},
        read=packed_integers,
    ),
    Spelling(
        ending="_packed",
        dtypes=("U8", "F4"),
        needed={"scales": ("_scale",)},
        optional={"global": ("_global_scale",)},
        read=packed_floats,
    ),
    Spelling(
        ending=".qweight",
        dtypes=("I32",),
        needed={"scales": (".scales",), "zeros": (".qzeros",)},
        optional={"order": (".g_idx",)},
        read=turned_integers,
        plain_ending=".weight",
    ),
    Spelling(
        ending=".W_q",
        dtypes=("U8", "I32", "F16", "BF16", "F32"),
        needed={"scales": (".scale",), "zeros": (".zero",), "shape": (".shape",)}
        | {"group": (".group_size",), "axis": (".axis",), "packing": (".packing",)},
        optional={"dtype": (".compute_dtype",)} | {name: (f".{name}",) for name in HQQ_NOTES},
        read=reshaped_integers,
        plain_ending=".weight",
    ),
    Spelling(
        ending="",
        dtypes=("I8",),
        needed={"scales": (".SCB",)},
        optional={"layout": (".weight_format",)},
        read=bytes_of_127,
    ),
    Spelling(
        ending="",
        dtypes=("U8",),
        needed={"scales": (".absmax",), "state": (".quant_state.bitsandbytes__nf4",), "map": (".quant_map",)},
        optional={"nested": (".nested_absmax",), "table": (".nested_quant_map",)},
        read=quantiles,
    ),
    Spelling(
        ending="",
        dtypes=("F8_E4M3",),
        needed={"scales": ("_scale_inv", "_scale", ".scale")},
        optional={},
        read=scaled_bytes,
        is_by_shape=True,
    ),
    Spelling(
        ending="",
        dtypes=("I8", "U8", "F4"),
        needed={"scales": ("_scale_inv", "_scale", ".scale")},
        optional={"global": ("_scale_2",)},
        read=whole_bytes,
    ),
)
"""Tried in this order; the first whose ending, dtype and needed companions are there reads the tensor."""
IGNORED_ENDINGS = (
    *("input_scale", "input_global_scale", "activation_scale", "input_scale_ub", "output_scale"),
    *("k_scale", "v_scale", "q_scale", "prob_scale"),
)
"""Scales of activations and of the cache of keys and values: products here take both as they are."""
COMPANION_ENDINGS = (
    *("_scale", "_scale_inv", "_scale_2", "_scales", "_global_scale", "_zero_point", "_shape", "_g_idx", "_blocks"),
    *("_packed", ".scale", ".scales", ".qzeros", ".g_idx", ".absmax", ".quant_map", ".SCB", ".weight_format"),
    *(".W_q", ".zero", ".packing", ".group_size"),
)
"""What names a companion: one that nothing consumed stands beside a tensor that would be read without it."""

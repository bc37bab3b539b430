"""RoutingTrace: which experts each token used at each MoE layer, as recorded or generated.

Shapes: T tokens (rows, in decode order), L MoE layers, K experts per token, E experts.
"""

import json
import os
import zipfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, Self

import numpy as np
from numpy.typing import NDArray

from ..ground.files import atomic_write

# ids are 0 and up, and the file keeps them as int16
EMPTY = -1
# 64 GiB hold 36 million tokens of 58 layers with top-8 and weights; a header that promises more is damaged or hostile
MAX_FILE_BYTES = 64 << 30


@dataclass(frozen=True, kw_only=True, eq=False)
class RoutingTrace:
    """What was routed where, for T tokens through L MoE layers.

    Args:
        expert_TLK: int16 expert ids in 0..E-1; -1 marks an empty slot (dropped token, padding, zero-compute expert).
        sequence_T: int32, which sequence a row belongs to; rows are in decode order.
        weight_TLK: float16 combine weights, or None.
        score_TLE: float16 router scores over all experts, or None.
        position_T: int32 position of the row within its sequence, or None.
        token_T: int32 vocabulary id of the row's token, or None.
        metadata: JSON-serialisable facts; `num_experts` is E, `layer_ids` are the decoder layers of the L MoE layers,
            `hidden_layers` counts dense layers too, `model` and `source` say where the trace came from.

    Raises:
        ValueError: if shapes disagree or an id is outside -1..E-1.
    """

    expert_TLK: NDArray[np.int16]
    sequence_T: NDArray[np.int32]
    weight_TLK: NDArray[np.float16] | None = None
    score_TLE: NDArray[np.float16] | None = None
    position_T: NDArray[np.int32] | None = None
    token_T: NDArray[np.int32] | None = None
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.expert_TLK.ndim != 3 or not np.issubdtype(self.expert_TLK.dtype, np.integer):
            raise ValueError(
                f"expert_TLK must be an integer array [T, L, K]; got {self.expert_TLK.dtype} {self.expert_TLK.shape}"
            )
        T, L, K = self.expert_TLK.shape
        if 0 in (L, K):
            raise ValueError(f"expert_TLK needs at least one layer and one slot; got shape {self.expert_TLK.shape}")
        _expect_integer("sequence_T", self.sequence_T)
        _expect_shape("sequence_T", self.sequence_T, (T,))
        for name in ("position_T", "token_T"):
            if (array := getattr(self, name)) is not None:
                _expect_integer(name, array)
                _expect_shape(name, array, (T,))
        if self.weight_TLK is not None:
            _expect_shape("weight_TLK", self.weight_TLK, (T, L, K))
        E = _declared_experts(self.metadata)
        if self.score_TLE is not None:
            _expect_shape("score_TLE", self.score_TLE, (T, L, E if E is not None else self.score_TLE.shape[-1]))
        _expect_layers(self.metadata, L)
        if T and (int(self.expert_TLK.min()) < EMPTY or int(self.expert_TLK.max()) >= self.num_experts):
            raise ValueError(
                f"expert ids must lie in -1..{self.num_experts - 1} (E={self.num_experts}); "
                f"got {int(self.expert_TLK.min())}..{int(self.expert_TLK.max())}"
            )
        object.__setattr__(self, "expert_TLK", self.expert_TLK.astype(np.int16, copy=False))
        object.__setattr__(self, "sequence_T", self.sequence_T.astype(np.int32, copy=False))

    @property
    def num_tokens(self) -> int:
        return self.expert_TLK.shape[0]

    @property
    def num_layers(self) -> int:
        return self.expert_TLK.shape[1]

    @property
    def top_k(self) -> int:
        return self.expert_TLK.shape[2]

    @property
    def num_experts(self) -> int:
        """E: as declared in the metadata, else the width of the scores, else the largest id plus one."""
        declared = _declared_experts(self.metadata)
        if declared is not None:
            return declared
        if self.score_TLE is not None:
            return int(self.score_TLE.shape[-1])
        return int(self.expert_TLK.max(initial=0)) + 1

    @property
    def layer_ids(self) -> tuple[int, ...] | None:
        """Decoder layer of each MoE layer as recorded, or None where nobody wrote it down."""
        ids = self.metadata.get("layer_ids")
        return None if ids is None else tuple(ids)

    def rows(self, start: int | None = None, stop: int | None = None) -> Self:
        """The trace of rows start..stop-1; E stays that of the whole trace."""
        return self.select(np.arange(self.num_tokens)[start:stop])

    def select(self, row_ids: NDArray[np.integer[Any]] | NDArray[np.bool_]) -> Self:
        """The trace of the given rows (ids or a boolean mask); E stays that of the whole trace."""
        optional = {
            name: None if (array := getattr(self, name)) is None else array[row_ids]
            for name in ("weight_TLK", "score_TLE", "position_T", "token_T")
        }
        return replace(
            self,
            expert_TLK=self.expert_TLK[row_ids],
            sequence_T=self.sequence_T[row_ids],
            metadata={**self.metadata, "num_experts": self.num_experts},
            **optional,
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the compressed `.npz` of this trace, atomically."""
        arrays: dict[str, Any] = {
            name: array
            for name in ("expert_TLK", "sequence_T", "weight_TLK", "score_TLE", "position_T", "token_T")
            if (array := getattr(self, name)) is not None
        }
        arrays["metadata"] = np.array(json.dumps({**self.metadata, "num_experts": self.num_experts}, allow_nan=False))
        with atomic_write(path, "wb") as file:
            np.savez_compressed(file, allow_pickle=False, **arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a trace; only `expert_TLK` and `sequence_T` are required, keys that are not ours are left alone.

        Raises:
            ValueError: if the file is not such an archive, is implausibly large or fails validation.
        """
        if not Path(path).is_file():
            raise ValueError(f"trace {path}: no such file")
        try:
            with zipfile.ZipFile(path) as archive:
                arrays = _read_arrays(archive)
        except zipfile.BadZipFile as error:
            raise ValueError(f"trace {path}: not a readable routing trace (.npz), or a damaged one") from error
        except (EOFError, OSError, ValueError, NotImplementedError) as error:
            raise ValueError(f"trace {path}: not a readable routing trace (.npz): {error}") from error
        try:
            return cls(**arrays)
        except ValueError as error:
            raise ValueError(f"trace {path}: {error}") from error


# the arrays of a trace file and their dimensions
_KEY_NDIM = {"expert_TLK": 3, "weight_TLK": 3, "score_TLE": 3, "metadata": 0}
_KEY_NDIM |= {"sequence_T": 1, "position_T": 1, "token_T": 1}


def _read_arrays(archive: zipfile.ZipFile) -> dict[str, Any]:
    names = {name.removesuffix(".npy") for name in archive.namelist()} & _KEY_NDIM.keys()
    if missing := {"expert_TLK", "sequence_T"} - names:
        raise ValueError(f"missing keys {sorted(missing)}")
    arrays: dict[str, Any] = {}
    for name in sorted(names):
        with archive.open(f"{name}.npy") as file:
            arrays[name] = _read_bounded(name, file)
    metadata = json.loads(str(arrays.pop("metadata", "{}")))
    if not isinstance(metadata, dict):
        raise ValueError(f"metadata must be a JSON object; got {type(metadata).__name__}")
    return {**arrays, "metadata": metadata}


def _read_bounded(name: str, file: IO[bytes]) -> NDArray[Any]:
    """Read one array after looking at the size its header promises."""
    version = np.lib.format.read_magic(file)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read_header(file)
    size = int(np.prod(shape, dtype=object)) * dtype.itemsize
    if len(shape) != _KEY_NDIM[name] or size > MAX_FILE_BYTES or dtype.hasobject:
        raise ValueError(
            f"{name} must have {_KEY_NDIM[name]} dimensions and at most {MAX_FILE_BYTES} bytes; got {dtype} {shape}"
        )
    file.seek(0)
    return np.lib.format.read_array(file, allow_pickle=False)


def _declared_experts(metadata: dict[str, Any]) -> int | None:
    declared = metadata.get("num_experts")
    if declared is None:
        return None
    if not isinstance(declared, int) or not 1 <= declared <= np.iinfo(np.int16).max:
        raise ValueError(f"metadata num_experts must be an integer in 1..{np.iinfo(np.int16).max}; got {declared!r}")
    return declared


def _expect_layers(metadata: dict[str, Any], num_layers: int) -> None:
    ids, hidden = metadata.get("layer_ids"), metadata.get("hidden_layers")
    if hidden is not None and (type(hidden) is not int or hidden < num_layers):
        raise ValueError(f"metadata hidden_layers must be a whole number >= {num_layers}; got {hidden!r}")
    if ids is None:
        return
    if not isinstance(ids, list | tuple) or not all(type(layer) is int and layer >= 0 for layer in ids):
        raise ValueError(f"metadata layer_ids must be decoder layers >= 0; got {ids!r}")
    if len(ids) != num_layers or list(ids) != sorted(set(ids)):
        raise ValueError(f"metadata layer_ids must be {num_layers} rising layers to match expert_TLK; got {ids!r}")
    if hidden is not None and ids[-1] >= hidden:
        raise ValueError(f"metadata layer_ids reach layer {ids[-1]}; hidden_layers says there are {hidden}")


def _expect_integer(name: str, array: NDArray[Any]) -> None:
    if not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{name} must hold integers; got {array.dtype}")


def _expect_shape(name: str, array: NDArray[Any], shape: tuple[int, ...]) -> None:
    if array.shape != shape:
        raise ValueError(f"{name} must have shape {shape} to match expert_TLK; got {array.shape}")

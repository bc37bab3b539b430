"""ExFlow: .npy [tokens, layers] of first choices, as ids 0..E-1 or numbered through (`id + E * layer`)."""

from pathlib import Path

import numpy as np

from .layer_csv import ONE_REQUEST
from .reading.arrays import load_npy
from .reading.opening import id_table
from .reading.recording import ImportOptions, Integer, Recording


def read_exflow(path: Path, options: ImportOptions) -> Recording:
    """Read the table; E decides whether ids are numbered through.

    Source: Yao et al. 2024 (ExFlow), arXiv:2401.08383.
    """
    expert_TL = id_table(load_npy(path), str(path), "[tokens, layers]")
    if not expert_TL.size:
        raise ValueError(f"{path}: holds no routed tokens")
    own_TL, notes, E = _own_ids(path, expert_TL, options.num_experts)
    T, L = own_TL.shape
    return Recording(
        expert_TLK=own_TL[:, :, None],
        sequence_T=np.zeros(T, np.int64),
        num_experts=E,
        read={"lines": T, "tokens": T, "layers": L},
        notes=(*notes, ONE_REQUEST),
    )


def _own_ids(path: Path, expert_TL: Integer, num_experts: int | None) -> tuple[Integer, tuple[str, ...], int | None]:
    """Ids within each layer, a note if they were numbered through, and E if the ids tell it."""
    least, most = _possible_experts(expert_TL)
    if num_experts is not None:
        if int(expert_TL.max()) < num_experts:
            return expert_TL, (), num_experts
        if not least <= num_experts <= most:
            raise ValueError(
                f"{path}: ids up to {expert_TL.max()} fit {num_experts} experts neither as they are nor numbered "
                "through the layers"
            )
        least = most = num_experts
    if expert_TL.shape[1] == 1 or least > most:
        return expert_TL, (), None
    if least < most:
        raise ValueError(
            f"{path}: ids may be numbered through the layers with {least} to {most} experts; say num_experts"
        )
    offset_L = least * np.arange(expert_TL.shape[1])
    return expert_TL - offset_L, (f"ids were numbered through the layers: id - {least} * layer is kept",), least


def _possible_experts(expert_TL: Integer) -> tuple[int, int]:
    """Smallest and largest E for which layer l holds only ids E*l .. E*l + E-1; smallest > largest if there is none."""
    lowest_L, highest_L = expert_TL.min(axis=0).tolist(), expert_TL.max(axis=0).tolist()
    least = max(high // (layer + 1) + 1 for layer, high in enumerate(highest_L))
    most = min((low // layer for layer, low in enumerate(lowest_L) if layer), default=0)
    return least, most

"""Whether a checkpoint holds plain float weights: quantised ones whose config is lost would load as noise."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .quantised.view import unused_companion
from .tensors import PLAIN_DTYPES, TensorEntry

Matches = Mapping[str, Sequence[tuple[str, str | None]]]


def expect_plain_weights(folder: Path, model: Any, entries: Mapping[str, TensorEntry], found: Matches) -> None:
    """Refuse weights that are stored as codes, and those whose scales are left over.

    A float parameter that is stored as integers is quantised. One that is stored in eight bits is, if the checkpoint
    holds more beside it that the model has no use for.

    Args:
        folder: of the checkpoint, for messages.
        model: the model or its skeleton.
        entries: the checkpoint's tensors.
        found: what `match_checkpoint` says of the two.

    Raises:
        ValueError: if the weights are quantised; the message names the tensors.
    """
    expected = model.state_dict()
    unused = sorted(key for name, keys in found.items() if name not in expected for key, _ in keys)
    for name, keys in found.items():
        if name not in expected or not expected[name].is_floating_point():
            continue
        for key, _ in keys:
            if entries[key].dtype in PLAIN_DTYPES:
                continue
            beside = [other for other in unused if other.startswith(_module_of(key))]
            if beside or not entries[key].dtype.startswith("F8"):
                raise _quantised(folder, key, entries[key].dtype, beside)
    used = {key: name for name, keys in found.items() if name in expected for key, _ in keys}
    if surplus := unused_companion(unused, used):
        raise ValueError(
            f"model {folder}: {surplus} {entries[surplus].dtype} {list(entries[surplus].shape)} stands beside a tensor "
            "that is read without it; the checkpoint is damaged, or stored in a form that is not known"
        )
    for name in expected.keys() - found.keys():
        if beside := [other for other in unused if other.startswith((f"{name}_", f"{name}."))]:
            raise _quantised(folder, name, entries[beside[0]].dtype, beside)


def _module_of(key: str) -> str:
    return key.rpartition(".")[0] + "."


def _quantised(folder: Path, key: str, dtype: str, beside: list[str]) -> ValueError:
    more = f", with {beside[0]} beside it" if beside else ""
    return ValueError(
        f"model {folder}: {key} is stored as {dtype}{more}, so the weights are quantised in a "
        "form that is not known; save a dequantised copy first"
    )

"""What a model's files say of its quantisation: the method, and the sizes of blocks and groups."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..location import read_json


@dataclass(frozen=True, kw_only=True)
class Quantisation:
    """What the description says.

    Args:
        method: `quant_method`; None if nothing describes the quantisation.
        blocks: rows and columns of the blocks that are named; if there are none, scales decide.
        groups: columns of the groups that are named.
        bits: bits of a code that are named.
        settings: the description as it stands in the file.
    """

    method: str | None
    blocks: tuple[tuple[int, int], ...] = ()
    groups: tuple[int, ...] = ()
    bits: tuple[int, ...] = ()
    settings: Mapping[str, Any]

    @property
    def rounds_in_scale(self) -> bool:
        """Whether products are rounded to the dtype of the scales, as compressed-tensors does."""
        return self.method == "compressed-tensors"


def find_quantisation(folder: Path) -> Quantisation:
    """The description in a model folder: of config.json, one of its parts, or hf_quant_config.json."""
    config = read_json(folder / "config.json", f"model {folder}: config.json")
    for found in _descriptions(config, folder):
        settings = found.get("quantization", found)
        method = found.get("quant_method") or settings.get("quant_method")
        if method is None and "quant_algo" in settings:
            method = "modelopt"
        return _described(None if method is None else str(method), settings)
    return Quantisation(method=None, settings={})


def without_quantisation(config: Any) -> Any:
    """Take the description off a config and its parts, so that transformers loads plain weights; gives the config."""
    for part in (config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", None) or {})):
        if part is not None and hasattr(part, "quantization_config"):
            del part.quantization_config
    return config


def _descriptions(config: Mapping[str, Any], folder: Path) -> Iterator[Mapping[str, Any]]:
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key in ("quantization_config", "compression_config"):
            if isinstance(found := part.get(key), dict) and found:
                yield found
    beside = folder / "hf_quant_config.json"
    if beside.is_file():
        yield read_json(beside, f"model {folder}: hf_quant_config.json")


def _described(method: str | None, settings: Mapping[str, Any]) -> Quantisation:
    weights = [settings, *_weight_schemes(settings)]
    blocks = [_pair(scheme.get(key)) for scheme in weights for key in ("weight_block_size", "block_structure")]
    groups = [_positive(scheme.get("group_size")) for scheme in weights]
    bits = [_positive(scheme.get(key)) for scheme in weights for key in ("num_bits", "bits")]
    return Quantisation(
        method=method,
        blocks=tuple(dict.fromkeys(block for block in blocks if block)),
        groups=tuple(dict.fromkeys(size for size in groups if size)),
        bits=tuple(dict.fromkeys(size for size in bits if size)),
        settings=settings,
    )


def _weight_schemes(settings: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The schemes for weights of compressed-tensors, and the layers of a mixture of ModelOpt."""
    for key in ("config_groups", "quantized_layers"):
        groups = settings.get(key)
        for group in groups.values() if isinstance(groups, dict) else ():
            if isinstance(group, dict):
                yield group
                if isinstance(weights := group.get("weights"), dict):
                    yield weights


def _pair(value: Any) -> tuple[int, int] | None:
    if isinstance(value, (list, tuple)) and len(value) == 2 and all(_positive(size) for size in value):
        return int(value[0]), int(value[1])
    return None


def _positive(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None

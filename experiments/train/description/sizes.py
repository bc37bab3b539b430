"""A model's shape from how many parameters it shall have, in all and per token; for plain mixtures of experts.

Shapes: D model width, E experts, K experts per token, F expert width.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

TOLERANCE = 0.05
"""Largest relative miss of either number; widths are multiples of eight, so a thousand parameters cannot be hit."""
MISS_WEIGHT = 300
"""A miss of a third of a percent costs as much as a shape with one ratio twice or half what is preferred."""
WIDTH_PER_LAYER = 32
"""D per layer that is preferred: between 12 and 43 in the presets."""
GRANULARITY = 4
"""2 D / F that is preferred: Ling's law peaks near 12, and narrow experts multiply slowly."""
WIDTH_STEP = 8
"""Expert widths are multiples of this, which is what vector units and tensor cores want."""
LEAST_ASPECT, MOST_ASPECT = 8, 160
"""D per layer that is looked at: published models lie between 40 and 130."""
# what presets and Mixtral visit; and deeper than any model that fits one machine
USUAL_TOP_K, MOST_LAYERS = 2, 128
# powers of two, so that experts divide among processes
EXPERTS, TOP_K = (4, 8, 16, 32, 64, 128, 256, 512), (1, 2, 4, 8)
# up to which width heads are 32 and 64 wide; wider models have 128, as published ones
NARROW, MIDDLE = 128, 1536
MOST_WIDTH = 8192
# what `5M` and the like multiply by
UNITS = {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9, "G": 1e9}
SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
EXPERT_SIZES = ("num_experts", "num_experts_per_tok", "moe_intermediate_size")


def parse_count(value: object) -> float:
    """Parameters as a person writes them: `5M`, `1.5B`, `200K` or a number.

    Raises:
        ValueError: if it is none, or not positive.
    """
    found = re.fullmatch(r"\s*([0-9.]+(?:[eE][+-]?[0-9]+)?)\s*([kKMBG]?)\s*", str(value))
    try:
        count = float(found[1]) * UNITS[found[2].upper()] if found else math.nan
    except ValueError:
        count = math.nan
    if not (math.isfinite(count) and count >= 1):
        raise ValueError(f"expected a number of parameters such as 5M or 1.5B; got {value!r}")
    return count


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes that parameters depend on, named as in `MoEConfig`."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int

    def parameters(self, rest: Mapping[str, Any]) -> tuple[int, int]:
        """All parameters, and those that a token visits.

        Args:
            rest: the model's other settings: vocabulary, norms, dense layers, shared experts.
        """
        D, E, F = self.hidden_size, self.num_experts, self.moe_intermediate_size
        query, key = (n * self.head_dim for n in (self.num_attention_heads, self.num_key_value_heads))
        norms = {"none": 0, "head": 2 * self.head_dim, "full": query + key}[rest["qk_norm"]]
        dense, shared = rest["num_dense_layers"], rest["num_shared_experts"]
        routed = self.num_hidden_layers - dense
        embeddings = rest["vocab_size"] * D * (1 if rest["tie_word_embeddings"] else 2)
        fixed = embeddings + D + self.num_hidden_layers * (2 * D * (query + key) + norms + 2 * D)
        fixed += dense * 3 * D * rest["intermediate_size"] + routed * (E * D + shared * 3 * D * F)
        per_expert = routed * 3 * D * F
        return fixed + E * per_expert, fixed + self.num_experts_per_tok * per_expert


def solved_shape(
    total: float, active: float | None, rest: Mapping[str, Any], wanted: Mapping[str, Any]
) -> dict[str, int]:
    """The shape that comes closest to so many parameters; among equals, the one with the preferred ratios.

    Args:
        total: parameters in all, embeddings included.
        active: parameters that a token visits; None leaves E and K as they are.
        rest: every setting of a plain mixture that is not looked for, and E and K to start from.
        wanted: sizes that are given and stay, by name.

    Raises:
        ValueError: if no shape comes within 5 % of both numbers; the message has the nearest.
    """
    if active is not None and active > total:
        raise ValueError(f"a token cannot visit {active:,.0f} of {total:,.0f} parameters; swap params and active")
    keep = dict(wanted) if active is not None else {name: rest[name] for name in EXPERT_SIZES[:2]} | dict(wanted)
    best, best_cost = None, math.inf
    for shape in _candidates(total, rest, keep):
        found = shape.parameters(rest)
        misses = [abs(math.log(found[0] / total)), abs(math.log(found[1] / active)) if active else 0.0]
        cost = MISS_WEIGHT * sum(misses) + _oddness(shape)
        if cost < best_cost:
            best, best_cost = (shape, found, max(misses)), cost
    if best is None or best[2] > TOLERANCE:
        nearest = f"; the nearest has {best[1][0]:,} with {best[1][1]:,} active" if best else ""
        asked = f"{total:,.0f} parameters" + (f" with {active:,.0f} active" if active else "")
        fixed = f" and {', '.join(f'{name} {value}' for name, value in wanted.items())}" if wanted else ""
        raise ValueError(f"no shape has {asked}{fixed}{nearest}; ask for other numbers")
    return asdict(best[0])


def _candidates(total: float, rest: Mapping[str, Any], keep: Mapping[str, Any]) -> Iterator[Shape]:
    experts = [keep["num_experts"]] if "num_experts" in keep else EXPERTS
    top_k = [keep["num_experts_per_tok"]] if "num_experts_per_tok" in keep else TOP_K
    for D, L in ((width, depth) for width in _widths(total, keep) for depth in _depths(width, rest, keep)):
        heads = _heads(D, keep)
        for E, K in product(experts, top_k):
            if K > E:
                continue
            sizes = {"hidden_size": D, "num_hidden_layers": L, "num_experts": E, "num_experts_per_tok": K, **heads}
            narrow, wide = (Shape(**sizes, moe_intermediate_size=F).parameters(rest)[0] for F in (0, WIDTH_STEP))
            widths = round((total - narrow) / (wide - narrow)) * WIDTH_STEP
            F = keep.get("moe_intermediate_size", widths)
            if F >= WIDTH_STEP or "moe_intermediate_size" in keep:
                yield Shape(**sizes, moe_intermediate_size=F)


def _widths(total: float, keep: Mapping[str, Any]) -> Iterator[int]:
    """D, as multiples of the head width, while embeddings and one layer's attention leave room for experts."""
    if "hidden_size" in keep:
        yield keep["hidden_size"]
        return
    D = keep.get("head_dim", 32)
    while D <= MOST_WIDTH and total > 3 * D * D:
        yield D
        D += keep.get("head_dim", _head_width(D))


def _depths(D: int, rest: Mapping[str, Any], keep: Mapping[str, Any]) -> Iterable[int]:
    """L, with room for one routed layer behind the dense ones."""
    if "num_hidden_layers" in keep:
        return [keep["num_hidden_layers"]]
    least = max(rest["num_dense_layers"] + 1, -(-D // MOST_ASPECT))
    return range(least, min(MOST_LAYERS, max(least, D // LEAST_ASPECT)) + 1)


def _head_width(D: int) -> int:
    return 32 if D < NARROW else 64 if D < MIDDLE else 128


def _heads(D: int, keep: Mapping[str, Any]) -> dict[str, int]:
    """Heads as wide as the model asks for, two of them per key where they are even."""
    width = keep.get("head_dim", 32 if D <= NARROW else 64 if D <= MIDDLE else 128)
    heads = keep.get("num_attention_heads", max(1, D // width))
    keys = keep.get("num_key_value_heads", heads // 2 if heads % 2 == 0 else heads)
    return {"num_attention_heads": heads, "num_key_value_heads": keys, "head_dim": width}


def _oddness(shape: Shape) -> float:
    """How far the ratios are from the preferred ones, in squared doublings."""
    per_layer = shape.hidden_size / shape.num_hidden_layers
    granularity = 2 * shape.hidden_size / shape.moe_intermediate_size
    ratios = (per_layer / WIDTH_PER_LAYER, granularity / GRANULARITY, shape.num_experts_per_tok / USUAL_TOP_K)
    return sum(math.log2(ratio) ** 2 for ratio in ratios)

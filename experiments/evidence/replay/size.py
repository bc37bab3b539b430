"""How large a replay checkpoint is, and in which form its experts are stored."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from routing.ground.expect import expect_name
from routing.traces import EMPTY, RoutingTrace

Form = Literal["plain", "fp8", "int4", "mxfp4"]
FORMS: Mapping[Form, float] = {"plain": 2.0, "fp8": 1.0 + 4 / 128**2, "int4": 0.5 + 2 / 32, "mxfp4": 0.5 + 1 / 32}
"""Bytes of a weight.

Plain is bfloat16. `fp8` has blocks of 128 x 128 codes of 8 bits with a float32 scale, as DeepSeek's; `int4` groups of
32 codes with a bfloat16 scale, as Kimi-K2's; `mxfp4` groups of 32 E2M1 codes with an exponent, as gpt-oss'."""
GROUP = 32
"""Columns that share a scale in forms of four bits."""


@dataclass(frozen=True, kw_only=True)
class ReplaySize:
    """Widths and form of a replay checkpoint; the rest follows from the trace.

    Its family is `gpt_oss` if the form is `mxfp4`, else `olmoe`.
    """

    hidden: int = 2048
    expert: int = 1344
    form: Form = "plain"


def usual_size(form: str) -> ReplaySize:
    """What `expertier bench offload --form` builds: gpt-oss-20b's own widths for `mxfp4`.

    Raises:
        ValueError: if there is no such form.
    """
    expect_name(form, FORMS, "form")
    return ReplaySize(hidden=2880, expert=2880, form="mxfp4") if form == "mxfp4" else ReplaySize(form=form)


def form_of(folder: Path) -> Form:
    """In which form the experts of a replay checkpoint are stored."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    method = config.get("quantization_config", {}).get("quant_method")
    forms: Mapping[str | None, Form] = {None: "plain", "fp8": "fp8", "compressed-tensors": "int4", "mxfp4": "mxfp4"}
    return forms[method]


def expect_replayable(trace: RoutingTrace, size: ReplaySize) -> int:
    """How many hidden dimensions mark experts.

    Raises:
        ValueError: if L * E > D, a row has empty slots, or widths do not suit the form.
    """
    marks = trace.num_layers * trace.num_experts
    if marks > size.hidden:
        raise ValueError(f"the marks of {trace.num_layers} x {trace.num_experts} experts need {marks} <= {size.hidden}")
    if (trace.expert_TLK == EMPTY).any():
        raise ValueError("the trace has empty slots; a replay needs K experts in every layer of every row")
    if size.form in ("int4", "mxfp4") and (size.hidden % GROUP or size.expert % GROUP):
        raise ValueError(f"{size.form} needs widths that {GROUP} divides, got {size.hidden} and {size.expert}")
    return marks


def replay_bytes(trace: RoutingTrace, size: ReplaySize) -> int:
    """Size of an `olmoe` checkpoint on disk, in bytes."""
    experts = trace.num_layers * trace.num_experts * 3 * size.hidden * size.expert * FORMS[size.form]
    attention = trace.num_layers * 4 * size.hidden**2
    return round(experts) + 2 * (attention + 2 * trace.num_tokens * size.hidden)

"""SGLang `--enable-return-routed-experts`: responses with `meta_info.routed_experts`, base64 of bare int32 ids.

The ids are those of [tokens, decoder layers, K] in one row; K comes from the user, the tokens from the response, and
the layers are what remains. Dense layers have a place too. The last token that was generated is not routed.
"""

import base64
import binascii
from pathlib import Path
from typing import Any

import numpy as np

from .reading.opening import json_records, wanted, whole
from .reading.recording import ImportOptions, Integer, LeftOut, Recording, one_after_another, without_dense_layers

KEY = "routed_experts"
# where `/generate` and the OpenAI-like endpoints put it
HOLDERS = ("meta_info", "sglext", "sgl_ext")


def holder_of(response: dict[str, Any]) -> dict[str, Any] | None:
    """The object with the routed experts: of the response itself, of `meta_info`, or None."""
    for name in HOLDERS:
        if isinstance(found := response.get(name), dict) and found.get(KEY) is not None:
            return found
    return None


def read_sglang_responses(path: Path, options: ImportOptions) -> Recording:
    """Read every response of a file, or of a folder's files; each is one request."""
    if options.top_k is None:
        raise ValueError(f"{path}: SGLang's responses do not say how many experts a token uses; give top_k")
    tables, responses = [], 0
    for where, response in _requests(path):
        responses += 1
        if (holder := holder_of(response)) is not None:
            tables.append(_table(holder, response, where, options.top_k))
    if not tables:
        raise ValueError(
            f"{path}: expected meta_info.{KEY}; none of {responses} responses has it. Start SGLang with "
            '--enable-return-routed-experts and ask with "return_routed_experts": true'
        )
    rows_TLK, sequence_T, position_T = one_after_another(tables, str(path))
    expert_TLK, layer_ids, dense = without_dense_layers(rows_TLK, str(path))
    L = rows_TLK.shape[1]
    return Recording(
        expert_TLK=expert_TLK,
        sequence_T=sequence_T,
        position_T=position_T,
        layer_ids=layer_ids or tuple(range(L)),
        hidden_layers=L,
        read={"lines": responses, "tokens": len(rows_TLK), "layers": L},
        left_out=(dense, LeftOut(unit="lines", count=responses - len(tables), reason="responses without routing")),
    )


def _requests(path: Path) -> Any:
    """Responses; those with several choices give one per choice."""
    for where, response in json_records(path):
        choices = response.get("choices")
        if holder_of(response) is None and isinstance(choices, list):
            for number, choice in enumerate(choices):
                yield f"{where}, choice {number}", {**response, **choice} if isinstance(choice, dict) else response
        else:
            yield where, response


def _table(holder: dict[str, Any], response: dict[str, Any], where: str, top_k: int) -> Integer:
    try:
        data = base64.b64decode(holder[KEY], validate=True)
    except (binascii.Error, ValueError, TypeError):
        raise ValueError(f"{where}: {KEY} must be base64 of int32 ids; got {str(holder[KEY])[:20]!r}") from None
    if len(data) % 4:
        raise ValueError(f"{where}: {KEY} has {len(data)} bytes, which are no int32 numbers")
    ids = np.frombuffer(data, "<i4").astype(np.int64)
    usage = response.get("usage") if "prompt_tokens" not in holder else holder
    prompt, generated = wanted(
        usage if isinstance(usage, dict) else holder, where, "prompt_tokens", "completion_tokens"
    )
    tokens = whole(prompt, where, "prompt_tokens") + max(whole(generated, where, "completion_tokens") - 1, 0)
    if not tokens or ids.size % (tokens * top_k):
        raise ValueError(
            f"{where}: {ids.size} ids do not divide into {tokens} routed tokens ({prompt} of the prompt, all but the "
            f"last of {generated}) with top-{top_k}; check top_k, and leave routed_experts_start_len at 0"
        )
    return ids.reshape(tokens, -1, top_k)

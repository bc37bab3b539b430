"""vLLM `--enable-return-routed-experts`: responses of the server, or of `LLM.generate`, as JSON.

Three forms of the same array [tokens, layers, K] are read: nested lists, base64 of a .npy file, and
`{"dtype", "shape", "data"}` with base64 of the bare numbers. The prompt stands at the response
(`prompt_routed_experts`), at the choice, or is the beginning of the choice's own array. A prompt is routed once for all
choices of a response: the first choice keeps it, the others start at the position behind it. The last token that was
generated is never routed.
"""

import base64
import binascii
import io
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from .reading.opening import id_table, json_records
from .reading.recording import ImportOptions, Integer, LeftOut, Recording, one_after_another, without_dense_layers

PROMPT, ROUTED = "prompt_routed_experts", "routed_experts"
AXES = "[tokens, layers, K]"
FILLER = "all-zero rows for the last generated token, which is never routed"
SHARED = "the same prompt, repeated for further choices of its response"


@dataclass(frozen=True, kw_only=True)
class _Request:
    table_TLK: Integer
    first_position: int = 0
    repeated: int = 0
    fillers: int = 0


def read_vllm(path: Path, options: ImportOptions) -> Recording:
    """Read every response of a file, or of a folder's files; each choice is one request."""
    requests: list[_Request] = []
    responses = without = 0
    for where, response in json_records(path):
        responses += 1
        found = _requests(response, where)
        without += not found
        requests += found
    tables = [request.table_TLK for request in requests]
    if not tables:
        raise ValueError(
            f"{path}: expected the key {ROUTED!r} in a response; none of {responses} has it. "
            "Start vLLM with --enable-return-routed-experts"
        )
    rows_TLK, sequence_T, position_T = one_after_another(tables, str(path))
    expert_TLK, layer_ids, dense = without_dense_layers(rows_TLK, str(path))
    first_N = np.array([request.first_position for request in requests])
    repeated, fillers = (sum(getattr(one, name) for one in requests) for name in ("repeated", "fillers"))
    return Recording(
        expert_TLK=expert_TLK,
        sequence_T=sequence_T,
        position_T=position_T + first_N[sequence_T],
        layer_ids=layer_ids,
        hidden_layers=rows_TLK.shape[1] if layer_ids else None,
        read={"lines": responses, "tokens": len(rows_TLK) + repeated + fillers, "layers": rows_TLK.shape[1]},
        left_out=(
            dense,
            LeftOut(unit="tokens", count=repeated, reason=SHARED),
            LeftOut(unit="tokens", count=fillers, reason=FILLER),
            LeftOut(unit="lines", count=without, reason="responses without routed experts"),
        ),
    )


def decode_table(value: Any, where: str) -> Integer:
    """One array of routed experts, in any of the forms.

    Raises:
        ValueError: if it is not an array of integers [tokens, layers, K].
    """
    if isinstance(value, str):
        return id_table(_npy(_base64(value, where), where), where, AXES)
    if isinstance(value, dict):
        return id_table(_bare(value, where), where, AXES)
    return id_table(value, where, AXES)


def _requests(response: dict[str, Any], where: str) -> list[_Request]:
    listed = response.get("choices", response.get("outputs", [response]))
    if not isinstance(listed, list) or not all(isinstance(choice, dict) for choice in listed):
        raise ValueError(f"{where}: choices must be a list of objects; got {str(listed)[:60]!r}")
    choices = [choice for choice in listed if choice.get(ROUTED) is not None]
    shared = response.get(PROMPT)
    prompt = None if shared is None else decode_table(shared, f"{where}, {PROMPT}")
    if not choices:
        return [] if prompt is None else [_Request(table_TLK=prompt)]
    prompt_tokens = _prompt_tokens(response)
    if prompt is not None and prompt_tokens not in (None, len(prompt)):
        raise ValueError(f"{where}: {len(prompt)} rows of {PROMPT} for a prompt of {prompt_tokens} tokens")
    found: list[_Request] = []
    for number, choice in enumerate(choices):
        place = f"{where}, choice {number}"
        own = prompt
        if choice.get(PROMPT) is not None and choice is not response:
            own = decode_table(choice[PROMPT], f"{place}, {PROMPT}")
        found.append(_request(decode_table(choice[ROUTED], f"{place}, {ROUTED}"), own, prompt_tokens, found))
    return _fitting_usage(response, found, prompt_tokens if prompt is None else len(prompt), where)


def _request(table_TLK: Integer, prompt_TLK: Integer | None, prompt: int | None, before: list[_Request]) -> _Request:
    """A choice with its prompt, if it is the first; without the prompt that an earlier choice has, if it is not."""
    fillers = int(len(table_TLK) > 1 and not table_TLK[-1].any() and table_TLK.shape[2] > 1)
    table_TLK = table_TLK[: len(table_TLK) - fillers]
    if prompt_TLK is not None:
        if before:
            return _Request(table_TLK=table_TLK, first_position=len(prompt_TLK), fillers=fillers)
        return _Request(table_TLK=_joined(prompt_TLK, table_TLK), fillers=fillers)
    if before and prompt and np.array_equal(table_TLK[:prompt], before[0].table_TLK[:prompt]):
        rest = table_TLK[prompt:]
        return _Request(table_TLK=rest, first_position=prompt, repeated=prompt, fillers=fillers)
    return _Request(table_TLK=table_TLK, fillers=fillers)


def _joined(prompt_TLK: Integer, table_TLK: Integer) -> Integer:
    """Prompt and generated rows; a response of one token generates no row, whose list has no layers to tell."""
    if not len(table_TLK) or not len(prompt_TLK):
        return prompt_TLK if len(prompt_TLK) else table_TLK
    if prompt_TLK.shape[1:] != table_TLK.shape[1:]:
        raise ValueError(f"{PROMPT} has [layers, K] {prompt_TLK.shape[1:]}, {ROUTED} has {table_TLK.shape[1:]}")
    return np.concatenate([prompt_TLK, table_TLK])


def _prompt_tokens(response: dict[str, Any]) -> int | None:
    """The prompt's length, if the response says it."""
    if isinstance(ids := response.get("prompt_token_ids"), list):
        return len(ids)
    usage = response.get("usage")
    count = usage.get("prompt_tokens") if isinstance(usage, dict) else None
    return count if isinstance(count, int) and count > 0 else None


def _fitting_usage(response: dict[str, Any], found: list[_Request], prompt: int | None, where: str) -> list[_Request]:
    """The requests, if their rows are those of the tokens that `usage` counts; each choice's last token may be missing.

    Where the rows are those of the generated tokens alone, as older servers send them, they begin behind the prompt.
    """
    usage = response.get("usage")
    generated = usage.get("completion_tokens") if isinstance(usage, dict) else None
    if not isinstance(generated, int) or prompt is None:
        return found
    rows = sum(len(one.table_TLK) for one in found)
    whole = prompt * (1 + sum(one.first_position == 0 for one in found[1:])) + generated
    if not whole - len(found) <= rows <= whole:
        if generated - len(found) <= rows <= generated and response.get(PROMPT) is None:
            return [replace(one, first_position=prompt) for one in found]
        raise ValueError(
            f"{where}: {rows} rows of routed experts for {prompt} prompt and {generated} generated tokens "
            f"({whole - len(found)} to {whole} rows were expected)"
        )
    return found


def _base64(text: str, where: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"{where}: expected base64; got {text[:20]!r}: {error}") from None


def _npy(data: bytes, where: str) -> Any:
    if not data.startswith(b"\x93NUMPY"):
        raise ValueError(f"{where}: expected base64 of a .npy array; it begins with {data[:6]!r}")
    try:
        return np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{where}: a damaged .npy array: {error}") from None


def _bare(value: dict[str, Any], where: str) -> Any:
    kind, shape, text = (value.get(key) for key in ("dtype", "shape", "data"))
    if kind not in ("uint8", "uint16", "int16", "int32", "int64") or not isinstance(text, str):
        raise ValueError(f"{where}: expected dtype, shape and base64 data; got {list(value)} with dtype {kind!r}")
    data = np.frombuffer(_base64(text, where), dtype=np.uint8)
    size = np.dtype(kind).itemsize
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape) or len(shape) != 3:
        raise ValueError(f"{where}: shape must be {AXES}; got {shape!r}")
    if len(data) != size * shape[0] * shape[1] * shape[2]:
        raise ValueError(f"{where}: {len(data)} bytes do not hold {shape} numbers of type {kind}")
    return data.view(kind).reshape(shape)

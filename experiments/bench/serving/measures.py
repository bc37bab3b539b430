"""What is measured of an engine; each function takes one that is ready and gives a row of the table."""

import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from offload import Engine, EngineCounters, QueueFull

from .clients import Answer, ask_all, follow, watch

Row = dict[str, Any]


def rates(engine: Engine, rows: Sequence[Sequence[int]], new_tokens: int) -> tuple[Row, list[Answer]]:
    """Tokens per second of all users together, while all answers are generated."""
    vocab_size = engine.model_info.vocab_size
    requests = [follow(user, new_tokens, vocab_size, owner=str(number)) for number, user in enumerate(rows)]
    before = engine.counters()
    answers = ask_all(engine, requests)
    after = engine.counters()
    began_s = max(answer.time_s[0] for answer in answers)
    ended_s = max(answer.time_s[-1] for answer in answers)
    tokens = sum(sum(began_s < second <= ended_s for second in answer.time_s) for answer in answers)
    row = {
        "users": len(rows),
        "tok_per_s": tokens / (ended_s - began_s),
        "prefill_s": after.prefill_s - before.prefill_s,
        "decode_s": after.decode_s - before.decode_s,
        "misses_per_row_and_layer": _misses(after, before) / max(after.rows_total - before.rows_total, 1),
        "longest_gap_s": max(answer.longest_gap_s for answer in answers),
        "steps": after.steps_total - before.steps_total,
    }
    return row, answers


def one_by_one(engine: Engine, rows: Sequence[Sequence[int]], new_tokens: int) -> tuple[Row, list[Answer]]:
    """What each of some users gets alone, one after the other: texts differ in what they miss, so all of them count."""
    found = [rates(engine, [user], new_tokens) for user in rows]
    each = [row for row, _ in found]
    row = {
        "users": 1,
        "texts": len(rows),
        "tok_per_s": len(each) / sum(1 / one["tok_per_s"] for one in each),
        "misses_per_row_and_layer": sum(one["misses_per_row_and_layer"] for one in each) / len(each),
        "longest_gap_s": max(one["longest_gap_s"] for one in each),
        **{name: sum(one[name] for one in each) for name in ("prefill_s", "decode_s", "steps")},
    }
    return row, [answer for _, answers in found for answer in answers]


def second_turn(engine: Engine, rows: Sequence[int], new_tokens: int, said: int = 16) -> Row:
    """Bytes and seconds to the first token of a conversation's second turn: cold, and after the first one.

    Args:
        rows: the first turn's prompt and answer, and what is said then.
        new_tokens: of the first turn's answer.
        said: tokens of the second turn.
    """
    vocab_size = engine.model_info.vocab_size
    found: Row = {"prompt_tokens": len(rows), "new_prompt_tokens": said}
    second = [*rows, rows[-1] + 1]
    for name, owner in (("cold", "nobody"), ("second", "somebody")):
        if name == "second":
            ask_all(engine, [follow(rows[:-said], new_tokens, vocab_size, owner=owner)])
        before = engine.counters()
        (answer,) = ask_all(engine, [follow(second, 1, vocab_size, owner=owner)])
        after = engine.counters()
        assert answer.finished is not None
        found |= {
            f"{name}_first_token_s": answer.first_s,
            f"{name}_bytes_read": sum(after.bytes_read_L) - sum(before.bytes_read_L),
            f"{name}_cached_tokens": answer.finished.usage.cached_tokens,
        }
    return found


def beside_a_prompt(engine: Engine, rows: Sequence[int], prompt: Sequence[int]) -> Row:
    """A stream while a long prompt is read: its longest gap, and its speed against before."""
    vocab_size = engine.model_info.vocab_size
    new_tokens = len(rows) - 16
    answer, done = watch(engine.submit(follow(rows, new_tokens, vocab_size, owner="stream")))
    while len(answer.time_s) < new_tokens // 4:
        time.sleep(0.01)
    alone = len(answer.time_s) - 1, answer.time_s[-1] - answer.time_s[0]
    began_s = time.perf_counter()
    other, other_done = watch(engine.submit(follow([*prompt, 1], 1, vocab_size, owner="prompt")))
    other_done.wait()
    ended_s = time.perf_counter()
    done.wait()
    inside = [began_s, *(second for second in answer.time_s if began_s < second <= ended_s), ended_s]
    return {
        "prompt_tokens": len(prompt),
        "prompt_s": other.first_s,
        "longest_gap_s": max(after - before for before, after in pairwise(inside)),
        "share_of_speed": (len(inside) - 2) / (ended_s - began_s) / (alone[0] / alone[1]),
        "stream_outlasted_it": bool(answer.time_s[-1] > ended_s),
    }


def overload(engine: Engine, rows: Sequence[int], requests: int) -> Row:
    """So many requests at once: who is refused, how quickly, and what becomes of the others."""
    vocab_size = engine.model_info.vocab_size
    accepted, refused_s, retry_s = [], [], []
    for _ in range(requests):
        started_s = time.perf_counter()
        try:
            accepted.append(engine.submit(follow(rows, 4, vocab_size)))
        except QueueFull as error:
            refused_s.append(time.perf_counter() - started_s)
            retry_s.append(error.retry_after_s)
    watched = [watch(stream) for stream in accepted]
    for _, done in watched:
        done.wait()
    reasons = [answer.finished.reason for answer, _ in watched if answer.finished is not None]
    return {
        "requests": requests,
        "refused": len(refused_s),
        "slowest_refusal_s": max(refused_s, default=0.0),
        "retry_after_s": [min(retry_s), max(retry_s)] if retry_s else None,
        "completed": reasons.count("length"),
    }


def cancels(engine: Engine, rows: Sequence[int], count: int) -> Row:
    """So many requests that are left, half of them before and half after their first token."""
    vocab_size = engine.model_info.vocab_size
    seen = []
    for number in range(count):
        stream = engine.submit(follow(rows, 16, vocab_size))
        if number % 2:
            stream.next()
        stream.cancel()
        while stream.finished is None:
            time.sleep(0.0005)
        if number in (count // 5, count - 1):
            seen.append(_resident_pages())
    counters = engine.counters()
    return {
        "cancels": count,
        "kv_in_use": counters.kv_in_use + counters.kv_reserved,
        "memory_growth": seen[-1] / seen[0] - 1,
    }


def _resident_pages() -> int:
    """Memory of this process now, in pages."""
    return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])


def _misses(after: EngineCounters, before: EngineCounters) -> float:
    return (sum(after.misses_L) - sum(before.misses_L)) / max(len(after.misses_L), 1)

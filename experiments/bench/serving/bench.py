"""`expertier bench serve`: what several users get from one engine, in this process."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from routing.ground.expect import expect_outputs, expect_there
from routing.ground.files import write_json
from routing.ground.terminal import plain_console

MEASURES = ("rates", "llama.cpp", "http", "turn", "prompt", "overload", "cancels")
SCHEDULES = ("turns", "together", "auto")
GROWTH_PLACES = 320
"""Places of the KV pool that a user reserves beyond his tokens, rounded up; with fewer, he waits for another to end."""

CheckpointArgument = Annotated[Path, typer.Argument(help="A replay checkpoint (`expertier bench offload` makes one).")]
MemoryOption = Annotated[str, typer.Option("--cpu-memory", help="Whole budget of the process, or auto.")]
SlotsOption = Annotated[int | None, typer.Option("--cache-experts", min=1, help="Slots per layer instead.")]
ArithmeticOption = Annotated[str, typer.Option("--arithmetic", help="exact, fixed or fast.")]
UsersOption = Annotated[list[int] | None, typer.Option("--users", min=1, help="Users at once; repeat for more.")]
TokensOption = Annotated[int, typer.Option("--new-tokens", min=2, help="Tokens of each answer.")]
PromptOption = Annotated[int, typer.Option("--prompt", min=16, help="Tokens of the long prompt.")]
MeasureOption = Annotated[list[str] | None, typer.Option("--measure", help="One of " + ", ".join(MEASURES))]
ScheduleOption = Annotated[list[str] | None, typer.Option("--schedule", help="One of " + ", ".join(SCHEDULES))]
WaitOption = Annotated[float, typer.Option("--longest-wait", help="Most seconds between turns of a user.")]
RepeatsOption = Annotated[int, typer.Option("--repeats", min=1, help="Rounds; schedules alternate in each.")]
JsonOption = Annotated[Path | None, typer.Option("--json", help="Also write the rows as JSON.")]
RecordOption = Annotated[bool, typer.Option("--record", help="Save a record.")]


def bench_serve(
    checkpoint: CheckpointArgument,
    cpu_memory: MemoryOption = "auto",
    cache_experts: SlotsOption = None,
    arithmetic: ArithmeticOption = "fixed",
    users: UsersOption = None,
    new_tokens: TokensOption = 64,
    prompt: PromptOption = 1024,
    measure: MeasureOption = None,
    schedule: ScheduleOption = None,
    longest_wait: WaitOption = 15.0,
    repeats: RepeatsOption = 1,
    json_file: JsonOption = None,
    record: RecordOption = False,
) -> None:
    """Several users of one engine: rates, second turns, long prompts, overload, cancels; llama.cpp and HTTP beside.

    Example: `expertier bench serve /tmp/replay --cpu-memory 6GiB --users 1 --users 4`
    """
    expect_outputs(json_file, inputs=[checkpoint])
    expect_there(checkpoint)
    wanted = _chosen("measure", measure, MEASURES)
    schedules = _chosen("schedule", schedule, SCHEDULES)
    load = {"cpu_memory": cpu_memory, "cache_experts": cache_experts, "arithmetic": arithmetic}
    console, results = plain_console(), []
    if "rates" in wanted:
        results += _rates(console, checkpoint, load, users or [1, 4], schedules, longest_wait, new_tokens, repeats)
    if "llama.cpp" in wanted:
        results += _peers(console, checkpoint, cpu_memory, users or [1, 4], new_tokens)
    if "http" in wanted:
        results += _http(console, checkpoint, load, new_tokens, repeats)
    results += _others(console, checkpoint, load, wanted, prompt)
    if json_file:
        write_json(json_file, results)
    if record:
        from ...evidence.record import save_record

        save_record(
            "bench-serve",
            results,
            config={**load, "new_tokens": new_tokens, "prompt": prompt, "longest_wait": longest_wait},
        )


def _chosen(kind: str, names: list[str] | None, known: tuple[str, ...]) -> list[str]:
    """What was named, or all of it.

    Raises:
        ValueError: for a name that is unknown.
    """
    for name in names or ():
        if name not in known:
            raise ValueError(f"unknown {kind} {name!r}; expected one of {', '.join(known)}")
    return names or list(known)


def _rates(
    console: Console,
    checkpoint: Path,
    load: dict[str, Any],
    users: list[int],
    schedules: list[str],
    longest_wait: float,
    new_tokens: int,
    repeats: int,
) -> list[dict[str, Any]]:
    """Every number of users in every schedule, in alternation; the answers must be those of each alone.

    One user is each of the most users in turn, alone. So all numbers of users are compared on the same texts, and on an
    engine with as many places and slots.
    """
    from .clients import user_rows
    from .measures import one_by_one, rates

    results: list[dict[str, Any]] = []
    alone: dict[int, list[Any]] = {}
    for repeat in range(repeats):
        for count in sorted(users):
            for schedule in schedules if count > 1 else ["turns"]:
                texts = max(users) if count == 1 else count
                rows = [user_rows(number, 16 + new_tokens) for number in range(texts)]
                places = max(users) * (max(48, 16 + new_tokens) + GROWTH_PLACES)
                options = {"schedule": schedule, "longest_wait_s": longest_wait}
                with _open(checkpoint, load, context=places, **options) as engine:
                    rates(engine, [user_rows(8, 32)], 16)  # experts that are used first, kernels that are compiled
                    row, answers = (one_by_one if count == 1 else rates)(engine, rows, new_tokens)
                for number, answer in enumerate(answers):
                    alone.setdefault(number, answer.events)
                same = all(alone[number] == answer.events for number, answer in enumerate(answers))
                if load["arithmetic"] == "fixed" and not same:
                    raise RuntimeError(f"{count} users, {schedule}: an answer differs from that of its user alone")
                kind = {"measure": "rates", "schedule": schedule, "repeat": repeat, "same_bits": same}
                results.append({**kind, **row})
                _print(console, results[-1])
    return results


def _peers(console: Console, checkpoint: Path, limit: str, users: list[int], new_tokens: int) -> list[dict[str, Any]]:
    """llama.cpp with as many users and as much memory."""
    from .llama_cpp import peer

    results = []
    for count in sorted(users):
        results.append(peer(checkpoint, limit, count, new_tokens))
        _print(console, results[-1])
    return results


def _http(
    console: Console, checkpoint: Path, load: dict[str, Any], new_tokens: int, repeats: int
) -> list[dict[str, Any]]:
    """One user over HTTP beside `generate`, in turns."""
    from .clients import user_rows
    from .over_http import beside_generate

    given = {name: str(value) for name, value in load.items() if value not in (None, "auto")}
    options = [text for name, value in given.items() for text in (f"--{name.replace('_', '-')}", value)]
    results = []
    for row in beside_generate(checkpoint, options, user_rows(0, 64), new_tokens, repeats):
        results.append(row)
        _print(console, row)
    return results


def _others(
    console: Console, checkpoint: Path, load: dict[str, Any], wanted: list[str], prompt: int
) -> list[dict[str, Any]]:
    from .clients import user_rows
    from .measures import beside_a_prompt, cancels, overload, second_turn

    results = []
    if "turn" in wanted:
        with _open(checkpoint, load, context=prompt + 256, reuse="any") as engine:
            results.append({"measure": "turn", **second_turn(engine, user_rows(0, prompt + 64), 32)})
            _print(console, results[-1])
    if "prompt" in wanted:
        with _open(checkpoint, load, context=2 * prompt + 1024, reuse="off") as engine:
            stream, long = user_rows(0, 400), user_rows(1, prompt)
            results.append({"measure": "prompt", **beside_a_prompt(engine, stream, long)})
            _print(console, results[-1])
    if "overload" in wanted:
        with _open(checkpoint, load, context=512, most_users=4, most_queued=16) as engine:
            results.append({"measure": "overload", **overload(engine, user_rows(0, 20), 64)})
            _print(console, results[-1])
    if "cancels" in wanted:
        with _open(checkpoint, load, context=512, most_users=4) as engine:
            results.append({"measure": "cancels", **cancels(engine, user_rows(0, 32), 1000)})
            _print(console, results[-1])
    return results


def _open(checkpoint: Path, load: dict[str, Any], context: int, **options: Any) -> Any:
    """An engine that is ready."""
    import offload

    settings = offload.EngineOptions(**{"reuse": "off", "lookup": "off", "most_users": 16, **options})
    engine = offload.Engine(lambda: offload.load(checkpoint, context=context, **load), settings)
    engine.wait_ready()
    return engine


def _print(console: Console, row: dict[str, Any]) -> None:
    parts = [f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in row.items()]
    console.print(", ".join(parts), highlight=False)

"""`expertier generate`: continue a text with the experts on disk and in a bounded part of memory."""

import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from routing.ground.expect import expect_outputs
from routing.ground.files import write_json
from routing.ground.hardware import Hardware as Rates
from routing.ground.quantity import format_size
from routing.ground.terminal import plain_console

from .generate_file import Prompts, answer_file
from .generate_options import GenerateOptions
from .options import Hardware, JsonFile, expect_model, quiet_transformers, with_options
from .processes import Processes, ProcessesOption, processes_of
from .screen import Screen


@with_options(GenerateOptions)
def generate(
    model: Annotated[
        str | None, typer.Argument(help="A Hugging Face model folder (safetensors), or a model id.")
    ] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", help="Text to continue; - reads it from stdin.")] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Most tokens to generate.")] = 64,
    prompts: Annotated[
        Path | None, typer.Option("--prompts", help="A file of prompts instead: JSON lines with prompt or messages.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Where answers to --prompts go, as JSON lines; a later run goes on.")
    ] = None,
    trace: Annotated[Path | None, typer.Option("--trace", help="Record the routing into this .npz file.")] = None,
    members: Annotated[
        Path | None,
        typer.Option("--members", help="Instead of a model: a YAML file of several, one of which answers."),
    ] = None,
    member: Annotated[
        str | None, typer.Option("--member", help="Which of --members answers; the prompt decides without it.")
    ] = None,
    hardware: Hardware = None,
    live: Annotated[
        bool, typer.Option("--live", help="Print speed, hit rate and bytes read while generating, on stderr.")
    ] = False,
    json_file: JsonFile = None,
    processes: ProcessesOption = None,
    *,
    options: GenerateOptions,
) -> None:
    """Continue a text with the experts on disk and in a bounded part of RAM; greedily, unless --temperature is given.

    The last lines, on stderr, say how it went. Prefill is the time to the first token. The hit rate is the share of
    experts that were in memory when a layer asked for them. Read counts the bytes of experts that came from the disk.
    Peak memory is the most RAM that the process has had, with weights, KV cache and libraries.

    Example: `expertier generate my-model --prompt "def main():" --cpu-memory 6GiB --json report.json`

    As a chat: `expertier generate my-model --chat --prompt "Why is the sky blue?" --temperature 0.7 --seed 1`

    Many prompts: `expertier generate my-model --prompts questions.jsonl --out answers.jsonl`

    With a GPU: `expertier generate my-model --prompt "def main():" --device cuda --gpu-memory 8GiB --cpu-memory 32GiB`

    One of several models in one budget: `expertier generate --members models.yaml --prompt "..." --cpu-memory 6GiB`

    On two processes, each with a part of the experts: `--processes 2 --cpu-memory 3GiB`; --plan is then one of
    `place solve`.
    """
    if members is not None:
        _answer_by_member(members, member, model, prompt, max_new_tokens, options, json_file)
        return
    if model is None or member is not None:
        raise ValueError("give a MODEL, or --members FILE (and --member NAME with it)")
    expect_model(model)
    stdin = "/dev/stdin" if prompt == "-" else None
    inputs = [model, hardware, prompts, *options.files, options.chat_template, stdin]
    expect_outputs(trace, json_file, out, inputs=inputs)
    if (prompt is None) == (prompts is None):
        raise ValueError("give either --prompt TEXT or --prompts FILE")
    if options.prefer_cached is not None and (prompts is not None or processes is not None):
        raise ValueError("--prefer-cached is of one prompt on one process; leave out --prompts and --processes")
    if prompts is not None:
        if any(given is not None for given in (trace, hardware, json_file, processes, options.skip_ffn)):
            raise ValueError(
                "--trace, --hardware, --processes, --skip-ffn and --json are of one prompt; drop them with --prompts"
            )
        answer_file(model, prompts, out, max_new_tokens, options)
        return
    rates = None if hardware is None else Rates.load(hardware)
    several = None if processes is None else processes_of(options.cpu_memory, trace)
    if several is not None and not several.are_started():
        raise typer.Exit(several.start(processes or 1))
    is_speaking = several is None or several.join()
    text = _read_stdin() if prompt == "-" else prompt or ""
    with Screen(is_live=live) as screen:
        result = _continue(model, text, max_new_tokens, options, screen, trace, rates, several)
    show(result)
    if json_file and is_speaking:
        write_json(json_file, {"model": model, "prompt": text, **result})


def _continue(
    model: str,
    prompt: str,
    max_new_tokens: int,
    options: GenerateOptions,
    screen: Screen,
    trace: Path | None,
    rates: Rates | None,
    several: Processes | None,
) -> dict[str, Any]:
    from ..checkpoint.location import local_folder, local_name

    screen.stage(f"downloading {model}" if local_name(model) is None else f"starting; {model} is read next")
    from ..runtime.loading import load
    from ..serve.generation import generate_text
    from ..serve.text import expect_room, open_text

    quiet_transformers()
    folder = local_folder(model, announce=screen.stage)
    text = open_text(folder)
    prompt_ids = Prompts(folder, text, options).ids(prompt)
    expect_room(len(prompt_ids), max_new_tokens, options.context)
    screen.stage(f"loading {model}")
    if several is None:
        loaded = load(folder, **options.for_loading, record_trace=trace is not None)
    else:
        # a predictor would read experts that are other processes'
        loaded = load(folder, **options.for_loading | {"plan": None, "node": None, "prefetch": "off"})
        several.spread(loaded, options.plan)
    if options.prefer_cached is not None:
        loaded.offload.prefer_cached(options.prefer_cached)
    with _skipping(loaded, options.skip_ffn) as skipped:
        result = generate_text(
            loaded,
            text,
            prompt_ids,
            max_new_tokens=max_new_tokens,
            show=screen.show,
            stage=screen.stage,
            say=screen.status,
            trace_file=trace,
            hardware=rates,
            choice=options.choice,
        )
    left_out = {} if skipped is None else {"skipped_share": skipped.skipped_share, "skipped_L": skipped.skipped}
    return {**result, **left_out, "note": text.note}


def _skipping(loaded: Any, threshold: float | None) -> AbstractContextManager[Any]:
    """Within, feed-forwards are left out; None leaves out nothing."""
    if threshold is None:
        return nullcontext()
    from moe import skip_feed_forward

    return skip_feed_forward(loaded, threshold=threshold)


def _answer_by_member(
    members: Path,
    member: str | None,
    model: str | None,
    prompt: str | None,
    max_new_tokens: int,
    options: GenerateOptions,
    json_file: Path | None,
) -> None:
    """Let the member that a prompt chooses answer it."""
    expect_outputs(json_file, inputs=[members])
    if model is not None or prompt is None:
        raise ValueError("--members takes the place of MODEL, and answers one --prompt")
    if others := [*options.only_for_one_model, *(["skip_ffn"] if options.skip_ffn is not None else [])]:
        raise ValueError(f"--{others[0].replace('_', '-')} is for one model; leave it out with --members")
    from ..members.members import load_members
    from ..serve.generation import generate_text
    from ..serve.text import expect_room, open_text

    quiet_transformers()
    text = _read_stdin() if prompt == "-" else prompt
    with Screen(is_live=False) as screen:
        screen.stage(f"opening the members of {members}")
        shared = {name: getattr(options, name) for name in ("cpu_memory", "context", "arithmetic", "io")}
        group = load_members(members, **shared)
        chosen = group.choose(text, member)
        folder = Path(group.folders[chosen.name])
        words = open_text(folder)
        prompt_ids = Prompts(folder, words, options).ids(text)
        expect_room(len(prompt_ids), max_new_tokens, options.context)
        result = generate_text(
            group.models[chosen.name],
            words,
            prompt_ids,
            max_new_tokens=max_new_tokens,
            show=screen.show,
            stage=screen.stage,
            choice=options.choice,
        )
        found = {"member": chosen.name, "why": chosen.why, "shares": chosen.share_M, "members": group.report()}
        group.close()
    show({**result, "note": words.note})
    plain_console(stderr=True, soft_wrap=True).print(f"answered by {chosen.name} ({chosen.why})")
    if json_file:
        write_json(json_file, {"model": str(folder), "prompt": text, **result, **found})


def show(report: dict[str, Any]) -> None:
    """Print how a generation went, on stderr, in lines of at most 80 columns.

    Args:
        report: what `generate_text` gave, and a `note` on its text.
    """
    console = plain_console(stderr=True, soft_wrap=True)
    if report["note"]:
        console.print(report["note"])
    if predicted := report["predicted"]:
        console.print(
            f"expected {predicted['tokens_per_second']:.2f} tok/s ({predicted['binds']} binds), "
            f"achieved {report['tokens_per_second']:.2f}"
        )
    console.print(
        f"{report['tokens_per_second']:.2f} tok/s, prefill {report['prefill_seconds']:.2f} s, "
        f"hit rate {report['hit_rate']:.3f}"
    )
    if preference := report["report"].get("prefer_cached"):
        console.print(
            f"LOSSY: {preference['changed']} of {preference['choices']} experts were chosen for being in memory; "
            "the text is not the model's"
        )
    if (skipped := report.get("skipped_share")) is not None:
        console.print(f"{skipped:.0%} of feed-forwards left out: this is not the model's own answer")
    console.print(f"read {format_size(report['bytes_read'])}, peak memory {format_size(report['peak_memory_bytes'])}")


def _read_stdin() -> str:
    data = sys.stdin.buffer.read()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"the prompt on stdin is not UTF-8 text (byte {error.start})") from error

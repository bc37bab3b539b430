"""What `expertier pack` does when it quantises: calibrate, choose, write, and say what came of it."""

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.progress import Progress

from routing.ground.files import write_json
from routing.ground.hardware import Hardware
from routing.ground.quantity import format_size, parse_size
from routing.ground.terminal import plain_console
from routing.traces import RoutingTrace

from ...forecast.fit import fit as fit_model
from ...formats.pack_index import PackIndex
from ...lowbit.bit_router import RouterResult, train_bit_router
from ...lowbit.calibrating import calibrate
from ...lowbit.expert import NEEDS_INPUTS
from ...lowbit.fitting import FittedBits, expected_speed, fit_bits
from ...lowbit.inputs import RecordedInputs
from ...lowbit.open_folder import write_open_folder
from ...lowbit.quantise import LEVELLED, Source, quantise, quantise_in_levels, quantise_to_ternary
from ...lowbit.usage import Usage
from ...lowbit.writing import Work, write_low_bit
from ...store.packing import beside, expect_own
from .options import TERNARY, LowBitOptions


def pack_low_bit(model: str, out: Path, form: str | None, options: LowBitOptions) -> None:
    """Write a packed copy with quantised experts."""
    console = plain_console(stderr=True, soft_wrap=True)
    inputs_folder = beside(out, ".part.inputs")
    source = Source.opened(model)
    expect_own(out, source.layers, source.entries)
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("reading the checkpoint", total=None)

        def tell(what: str, done: int, total: int) -> None:
            progress.update(task, description=what, completed=done, total=total or None)

        inputs = _inputs(model, inputs_folder, options, form, tell)
        method = options.method_for(form)
        report: dict[str, Any] = {"model": model, "form": form, "method": method}
        if options.fit is not None:
            bits = _fitted(model, out, source, inputs, options, tell)
            console.print(_expectation(source, bits, model, options))
            report["fit"] = bits.as_json()
            recipe = {"fit": options.fit, "method": method, "group": options.group}
            needed = inputs if method in NEEDS_INPUTS else None
            work = Work(source.model, source.forms, bits.schemes_L, method, needed, recipe)
            methods = write_low_bit(
                out, work, PackIndex.of(source.entries), lambda done, total: tell("quantising", done, total)
            )
            beside(out, ".part.errors").unlink()
        elif form in LEVELLED:
            methods = quantise_in_levels(
                model,
                out,
                form=form,
                group=options.group,
                levels=options.levels,
                usage=_usage(inputs, options),
                progress=lambda done, total: tell("quantising", done, total),
            )
        elif form == TERNARY:
            methods = quantise_to_ternary(
                model,
                out,
                inputs=inputs if method in NEEDS_INPUTS else None,
                progress=lambda done, total: tell("quantising", done, total),
            )
        else:
            assert form is not None
            methods = quantise(
                model,
                out,
                form=form,
                method=method,
                group=options.group,
                inputs=inputs,
                progress=lambda done, total: tell("quantising", done, total),
            )
        if options.router_bits is not None:
            assert inputs is not None
            routed = train_bit_router(model, out, inputs, options.router_bits, tell)
            console.print(_routed(routed))
            report["router"] = asdict(routed)
        if options.open_folder is not None:
            write_open_folder(
                model, out, options.open_folder, progress=lambda done, total: tell("writing the folder", done, total)
            )
    if inputs_folder.exists():
        shutil.rmtree(inputs_folder)
    size = out.stat().st_size
    report |= {"methods": methods, "bytes": size, "bits_per_weight": 8 * size / source.num_weights}
    console.print(
        f"experts packed in {out}, {format_size(size)}, {report['bits_per_weight']:.2f} bits per weight: "
        f"{_said(methods, method)}"
    )
    if options.json_file:
        write_json(options.json_file, report)


def _inputs(model: str, folder: Path, options: LowBitOptions, form: str | None, tell: Any) -> RecordedInputs | None:
    """What the experts see, where it is asked for."""
    is_needed = options.method_for(form) in NEEDS_INPUTS or options.fit is not None or form in LEVELLED
    if options.calibrate is None or options.is_trace or not is_needed:
        return None
    return calibrate(
        model,
        options.calibrate,
        folder,
        tokens=options.tokens,
        length=options.length,
        cpu_memory=options.cpu_memory,
        needs_sensitivity=options.fit is not None or options.router_bits is not None,
        progress=tell,
    )


def _usage(inputs: RecordedInputs | None, options: LowBitOptions) -> Usage:
    """How much each expert counts, by a text or a trace."""
    return Usage(inputs, RoutingTrace.load(options.calibrate) if options.is_trace and options.calibrate else None)


def _fitted(
    model: str, out: Path, source: Source, inputs: RecordedInputs | None, options: LowBitOptions, tell: Any
) -> FittedBits:
    assert options.fit is not None
    return fit_bits(
        source,
        fit_model(model, cpu_memory=options.fit),
        parse_size(options.fit),
        beside(out, ".part.errors"),
        group=options.group,
        method=options.method_for(None),
        usage=_usage(inputs, options),
        inputs=inputs,
        progress=lambda done, total: tell("measuring errors", done, total),
    )


def _expectation(source: Source, bits: FittedBits, model: str, options: LowBitOptions) -> str:
    """What is expected, said before anything is written."""
    matrices = ", ".join(f"{count} as {name}" for name, count in sorted(bits.bits_per_weight.items()))
    said = f"chosen for {options.fit}: {matrices}; {format_size(bits.choice.nbytes)} of experts"
    if bits.divergence is not None:
        said += f"; expected: {bits.divergence:.4f} nats per token more loss"
    else:
        said += "; the loss is not foretold without --calibrate TEXT"
    if options.hardware is None:
        return f"{said}; for the speed, add --hardware FILE of `expertier calibrate`"
    speed = expected_speed(source, fit_model(model), bits, Hardware.load(options.hardware))
    return f"{said}; {speed:.1f} tokens/s with all experts in memory"


def _routed(found: RouterResult) -> str:
    return (
        f"bit router, on rows held out: {found.bits:.2f} bits of a weight cost {found.cost:.3g} nats for each expert "
        f"of a token; the same bits without a router {found.mixed_cost:.3g}"
    )


def _said(methods: dict[str, int], method: str) -> str:
    parts = [
        f"{count} experts as {name}" if name in LEVELLED else f"{count} experts by {name}"
        for name, count in sorted(methods.items())
        if name != "stored"
    ]
    if "stored" in methods:
        parts.append(f"{methods['stored']} were quantised already and are copied")
    fallen = sum(count for name, count in methods.items() if name not in (method, "stored"))
    if fallen and method in NEEDS_INPUTS:
        parts.append(f"the text hardly reached {fallen}, which fell back")
    return ", ".join(parts)

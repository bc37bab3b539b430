"""Quality against stored bits: small models trained here, quantised by every method, judged on held-out text.

Each seed trains a model of its own, so rankings rest on several. A folder keeps models and packed copies, and a run that
was interrupted goes on. No parity gate: nothing is timed, and tests compare every stored form with other decoders.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer
from rich.table import Table

from routing.ground.files import write_json
from routing.ground.terminal import plain_console

from ..evidence.record import RECORDS, expect_records, save_record

MODEL = {
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "num_experts": 16,
    "moe_intermediate_size": 128,
    "qk_norm": "full",
}
SEQUENCE, BATCH, WARM_UP = 128, 8, 30
CALIBRATION_TOKENS = 16_384
UNIFORM = (
    *((form, method) for form in ("int4", "int3", "int2") for method in ("rtn", "hqq", "awq", "gptq")),
    *(("int8", "rtn"), ("mxfp4", "rtn")),
)
MIXED_BITS = (2.75, 3.5, 3.76)
"""Mean stored bits of a weight that the integer programme may spend."""


def bench_low_bits(
    work: Annotated[Path, typer.Option("--work", help="Folder for models and packed copies; reused if it is there.")],
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Models to train.")] = 3,
    steps: Annotated[int, typer.Option("--steps", min=40, help="Optimiser steps of each.")] = 300,
    tokens: Annotated[int, typer.Option("--tokens", min=256, help="Held-out tokens to judge on.")] = 8_192,
    records: Annotated[Path, typer.Option("--records", help="Where the record is kept.")] = RECORDS,
) -> None:
    """Train small models, quantise their experts in every form, and compare them with the originals.

    Example: `expertier bench low-bits --work /tmp/low-bits`
    """
    expect_records(records)
    if work.exists() and not work.is_dir():
        raise ValueError(f"--work {work} is a file; give a folder")
    rows = []
    for seed in range(seeds):
        model, calibration, held_out = _trained(work / f"seed-{seed}", seed, steps)
        for case, found in _judged(model, calibration, held_out, tokens):
            rows.append({"seed": seed, **case, **found})
            plain_console(stderr=True).print(" ".join(f"{key}={_short(value)}" for key, value in rows[-1].items()))
    _show(rows)
    config = {"model": MODEL, "steps": steps, "seeds": seeds, "tokens": tokens, "calibration": CALIBRATION_TOKENS}
    save_record("low-bits", rows, config=config, seed=0, folder=records)


def _trained(folder: Path, seed: int, steps: int) -> tuple[Path, Path, Path]:
    """A model in bfloat16 as a family of transformers, text it was trained on, and text it was not."""
    from moe.conversion.export import export
    from moe.model.decoder import MoEForCausalLM
    from moe.parts.text import carry_text_files

    from ..train.corpus import load_corpus
    from ..train.presets import TrainConfig
    from ..train.torch_run import train

    model, calibration, held_out = folder / "model", folder / "seen.txt", folder / "held-out.txt"
    if (model / "config.json").is_file() and held_out.is_file():
        return model, calibration, held_out
    config = TrainConfig(
        model=MODEL,
        steps=steps,
        batch_size=BATCH,
        sequence_length=SEQUENCE,
        learning_rate=3e-3,
        warmup_steps=WARM_UP,
        precision="float32",
        evaluate_every=steps,
        checkpoint_every=steps,
        held_out_tokens=32_768,
        seed=seed,
    )
    corpus = load_corpus(None)
    folder.mkdir(parents=True, exist_ok=True)
    train(config, corpus, folder / "run", resume=(folder / "run").is_dir())
    for file, stream in ((calibration, corpus.train), (held_out, corpus.held_out)):
        file.write_bytes(bytes(stream[: 1 << 18]))
    trained = MoEForCausalLM.from_pretrained(folder / "run")
    export(trained, "olmoe").bfloat16().save_pretrained(model)
    carry_text_files(folder / "run", model, vocab_size=trained.config.vocab_size)
    return model, calibration, held_out


def _judged(model: Path, calibration: Path, held_out: Path, tokens: int) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """What each way to store the experts costs; each is written and judged once."""
    from offload.lowbit.calibrating import calibrate
    from offload.quality.quality import Contestant, Judge

    inputs = calibrate(
        model, calibration, model.parent / "inputs", tokens=CALIBRATION_TOKENS, length=256, needs_sensitivity=True
    )
    with TemporaryDirectory() as scratch:
        judge = Judge(Contestant(path_or_id=model), held_out, Path(scratch), tokens=tokens)
        for form, method in UNIFORM:
            yield _case(model, judge, tokens, form, method, _uniform(model, form, method, inputs))
        for bits in MIXED_BITS:
            yield _case(model, judge, tokens, f"mixed-{bits}", "gptq", _mixed(model, bits, "gptq", inputs))


def _uniform(model: Path, form: str, method: str, inputs: Any) -> Callable[[Path], dict[str, Any]]:
    from offload.lowbit.quantise import quantise

    def write(target: Path) -> dict[str, Any]:
        quantise(model, target, form=form, method=method, inputs=inputs)
        return {"expected_divergence": ""}

    return write


def _mixed(model: Path, bits: float, method: str, inputs: Any) -> Callable[[Path], dict[str, Any]]:
    from offload.formats.pack_index import PackIndex
    from offload.lowbit.choosing import choose
    from offload.lowbit.fitting import CANDIDATES, schemes_of
    from offload.lowbit.measuring import Usage, measure
    from offload.lowbit.quantise import GROUP, Source
    from offload.lowbit.writing import Work, write_low_bit

    def write(target: Path) -> dict[str, Any]:
        source = Source.opened(model)
        candidates = [(form, GROUP) for form in CANDIDATES]
        sensitivity_L = inputs.about["sensitivity"]
        units = measure(source, candidates, Usage(inputs), sensitivity_L, target.with_suffix(".errors"), method, inputs)
        weights = sum(form.layer.num_experts * form.layer.plain_bytes // 2 for form in source.forms)
        choice = choose(units, int(weights * bits / 8))
        schemes_L = schemes_of(source, units, choice)
        work = Work(source.model, source.forms, schemes_L, method, inputs, {"bits": bits, "method": method})
        write_low_bit(target, work, PackIndex.of(source.entries))
        return {"expected_divergence": choice.cost}

    return write


def _case(
    model: Path, judge: Any, tokens: int, form: str, method: str, write: Callable[[Path], dict[str, Any]]
) -> tuple[dict[str, Any], dict[str, Any]]:
    from offload.quality.quality import Contestant

    case = {"form": form, "method": method}
    file, kept = model.parent / f"{form}.{method}.pack", model.parent / f"{form}.{method}.{tokens}.json"
    if not kept.is_file():
        told = write(file)
        judged = judge.judge(Contestant(path_or_id=model, pack=file))
        write_json(kept, {**judged.as_json(), **told})
        file.unlink()
    found = json.loads(kept.read_text(encoding="utf-8"))
    low, high = found["interval"]
    return case, {
        "bits": found["bits_per_weight"],
        "reference_loss": found["reference_loss"],
        "loss_difference": found["loss_difference"],
        "low": low,
        "high": high,
        "agreement": found["agreement"],
        "divergence": found["divergence"],
        "expert_error": sum(layer["error"] for layer in found["layers"]) / len(found["layers"]),
        "expected_divergence": found["expected_divergence"],
    }


def _short(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def _show(rows: list[dict[str, Any]]) -> None:
    table = Table("form", "method", "bits", "more loss, %", "same greedy token", "divergence")
    cases = list(dict.fromkeys((row["form"], row["method"]) for row in rows))
    for form, method in cases:
        of = [row for row in rows if (row["form"], row["method"]) == (form, method)]

        def mean(key: str, of: list[dict[str, Any]] = of) -> float:
            return float(sum(row[key] for row in of) / len(of))

        share = sum(row["loss_difference"] / row["reference_loss"] for row in of) / len(of)
        table.add_row(
            *(form, method, f"{mean('bits'):.2f}", f"{100 * share:+.2f}"),
            *(f"{mean('agreement'):.2%}", f"{mean('divergence'):.5f}"),
        )
    plain_console().print(table)

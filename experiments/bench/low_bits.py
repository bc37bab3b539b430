"""Quality against stored bits: small models trained here, quantised by every method, judged on held-out text.

Each seed trains a model of its own, so rankings rest on several. A folder keeps models and packed copies, and a run
that was interrupted goes on. No parity gate: nothing is timed, and tests compare every stored form with other decoders.
"""

import json
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer
from rich.table import Table

from routing.ground.files import write_json
from routing.ground.terminal import plain_console

from ..evidence.record import RECORDS, expect_records, save_record

# small enough for a core to train in minutes, with as many experts as quantising by usage needs
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
# chosen once, not tuned
SEQUENCE, BATCH, WARM_UP = 128, 8, 30
# 4,096 rows for each expert that is visited as often as the others
CALIBRATION_TOKENS = 16_384
UNIFORM = (
    *(("int4", "rtn"), ("int4", "hqq"), ("int4", "awq"), ("int4", "gptq")),
    *(("int3", "rtn"), ("int3", "gptq"), ("int2", "rtn"), ("int2", "hqq"), ("int2", "gptq")),
)
MIXED_BITS = 3.76
"""Mean stored bits of a weight that the integer programme may spend: half-way from int3 to int4 with their scales."""
DEPTHS = (1, 2, 3)
"""Levels of planes: two, three and four bits."""


@dataclass(frozen=True)
class Case:
    """One way to store experts.

    Args:
        form: what the table calls it.
        method: what quantises.
        depth: levels that are read.
    """

    form: str
    method: str
    depth: int | str = "all"


CASES = (
    *(Case(form, method) for form, method in UNIFORM),
    Case("mixed", "gptq"),
    *(Case("planes", "levels", depth) for depth in DEPTHS),
)


def bench_low_bits(
    work: Annotated[Path, typer.Option("--work", help="Folder for models and packed copies; reused if it is there.")],
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Models to train.")] = 3,
    steps: Annotated[int, typer.Option("--steps", min=40, help="Optimiser steps of each.")] = 300,
    tokens: Annotated[int, typer.Option("--tokens", min=256, help="Held-out tokens to judge on.")] = 4_096,
    records: Annotated[Path, typer.Option("--records", help="Where the record is kept.")] = RECORDS,
) -> None:
    """Train small models, quantise their experts in every form, and compare them with the originals.

    Example: `expertier bench low-bits --work /tmp/low-bits`
    """
    expect_records(records)
    if work.exists() and not work.is_dir():
        raise ValueError(f"--work {work} is a file; give a folder")
    rows = []
    with TemporaryDirectory() as scratch:
        models = [_Trained(work / f"seed-{seed}", seed, steps, tokens, Path(scratch)) for seed in range(seeds)]
        for case in CASES:
            for model in models:
                rows.append({"seed": model.seed, **asdict(case), **model.found(case)})
                plain_console(stderr=True).print(" ".join(f"{key}={_short(value)}" for key, value in rows[-1].items()))
    _show(rows)
    config = {"model": MODEL, "steps": steps, "seeds": seeds, "tokens": tokens, "calibration": CALIBRATION_TOKENS}
    save_record("low-bits", rows, config=config, seed=0, folder=records)


class _Trained:
    """A model that was trained here, and the judge of what becomes of it.

    Args:
        folder: keeps everything.
        seed: of the training, 0 or more.
        steps: optimiser steps, at least 40.
        tokens: of held-out text to judge on.
        scratch: for the judge.
    """

    def __init__(self, folder: Path, seed: int, steps: int, tokens: int, scratch: Path) -> None:
        from offload import Contestant, Judge, calibrate

        self.seed, self._folder, self._tokens = seed, folder, tokens
        self._model, calibration, held_out = _trained(folder, seed, steps)
        self._inputs = calibrate(
            self._model, calibration, folder / "inputs", tokens=CALIBRATION_TOKENS, length=256, needs_sensitivity=True
        )
        place = scratch / str(seed)
        place.mkdir()
        self._judge = Judge(Contestant(path_or_id=self._model), held_out, place, tokens=tokens)

    def found(self, case: Case) -> dict[str, Any]:
        """What a way to store experts costs; it is written and judged once."""
        from offload import Contestant

        kept = self._folder / f"{case.form}.{case.method}.{case.depth}.{self._tokens}.json"
        if not kept.is_file():
            file = self._folder / f"{case.form}.{case.method}.pack"
            told = self._write(case, file)
            judged = self._judge.judge(Contestant(path_or_id=self._model, pack=file, depth=case.depth))
            write_json(kept, {**judged.as_json(), **told})
        found = json.loads(kept.read_text(encoding="utf-8"))
        low, high = found["interval"]
        return {
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

    def _write(self, case: Case, target: Path) -> dict[str, Any]:
        from offload import quantise, quantise_in_levels, quantise_to_bits

        if case.form == "planes":
            quantise_in_levels(self._model, target, form="planes")
        elif case.form == "mixed":
            choice = quantise_to_bits(self._model, target, MIXED_BITS, method=case.method, inputs=self._inputs)
            return {"expected_divergence": choice.cost}
        else:
            quantise(self._model, target, form=case.form, method=case.method, inputs=self._inputs)
        return {"expected_divergence": ""}


def _trained(folder: Path, seed: int, steps: int) -> tuple[Path, Path, Path]:
    """A model in bfloat16 as a family of transformers, text it was trained on, and text it was not."""
    from moe import MoEForCausalLM, export, save_byte_tokenizer

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
    save_byte_tokenizer(model)
    return model, calibration, held_out


def _short(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def _show(rows: list[dict[str, Any]]) -> None:
    table = Table("form", "method", "levels", "bits", "more loss, %", "same greedy token", "divergence")
    for case in CASES:
        of = [row for row in rows if (row["form"], row["method"], row["depth"]) == astuple(case)]

        def mean(key: str, of: list[dict[str, Any]] = of) -> float:
            return float(sum(row[key] for row in of) / len(of))

        share = sum(row["loss_difference"] / row["reference_loss"] for row in of) / len(of)
        table.add_row(
            *(case.form, case.method, str(case.depth), f"{mean('bits'):.2f}", f"{100 * share:+.2f}"),
            *(f"{mean('agreement'):.2%}", f"{mean('divergence'):.5f}"),
        )
    plain_console().print(table)

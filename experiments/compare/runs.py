"""The runs of a comparison: every variant with every seed, each in its own folder, resumable."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from routing.ground.files import write_json

from ..train.description.config import TrainConfig
from ..train.fitting import fitting_model
from ..train.metrics import without_nan
from ..train.presets import with_rate
from ..train.run_folder import checkpoints, differences, plain
from ..train.text.chosen import Text

RESULT_FILE, CONFIG_FILE = "compare_result.json", "compare_config.json"


@dataclass(frozen=True, kw_only=True)
class Run:
    """One variant with one seed.

    Args:
        variant: a name that `expect_variant` knows.
        config: everything that training depends on besides the text.
        text: what it is trained on.
        folder: where checkpoints, metrics and the result go.
    """

    variant: str
    config: TrainConfig
    text: Text
    folder: Path

    @property
    def result(self) -> dict[str, Any] | None:
        """What came out, if the run has finished or diverged; one that failed is tried again."""
        found = _read(self.folder / RESULT_FILE)
        return None if found is None or found["status"] == "failed" else found


def plan_runs(
    variants: list[str],
    base: TrainConfig,
    seeds: int,
    text: Text,
    out: Path,
    rates: Mapping[str, float] | None = None,
) -> list[Run]:
    """Every variant with every seed, seeds outermost, so that an interrupted comparison has all variants.

    Args:
        variants: names.
        base: what all runs share.
        seeds: runs per variant.
        text: what they read.
        out: folder of the comparison.
        rates: learning rate of each variant; None for the base's.

    Raises:
        ValueError: if there is no variant, or one is unknown, named twice or does not fit the preset's sizes.
    """
    if not variants:
        raise ValueError("no variant to compare; name at least one, such as top2,rmoe, or `all`")
    if len(set(variants)) != len(variants):
        raise ValueError(f"a variant is named twice in {', '.join(variants)}")
    if seeds < 1:
        raise ValueError(f"seeds must be at least 1; got {seeds}")
    if base.backend != "torch":
        raise ValueError(f"comparisons and sweeps train by torch; this description says backend {base.backend}")
    if rates is not None and (missing := [name for name in variants if name not in rates]):
        raise ValueError(f"no learning rate is given for {', '.join(missing)}; sweep them as well")
    models = {name: fitting_model(name, base.model) for name in variants}
    return [
        Run(
            variant=name,
            config=replace(
                base if rates is None else with_rate(base, rates[name]), model=models[name], seed=base.seed + seed
            ),
            text=text,
            folder=out / "runs" / name / f"seed_{base.seed + seed}",
        )
        for seed in range(seeds)
        for name in variants
    ]


def execute_one(run: Run, threads: int | None) -> dict[str, Any]:
    """Train, or continue training, then measure; the result is on disk when this returns.

    A loss that is no longer finite ends the run with the status `diverged`; any other error, with `failed`.
    """
    import torch

    if threads:
        torch.set_num_threads(threads)
    run.folder.mkdir(parents=True, exist_ok=True)
    write_json(run.folder / CONFIG_FILE, _settings(run))
    try:
        result = _train_and_measure(run, run.text.load())
    except FloatingPointError as error:
        result = {"status": "diverged", "message": str(error)}
    except Exception as error:  # whatever ends one run, the others go on
        result = {"status": "failed", "message": f"{type(error).__name__}: {error}"}
    result = {"variant": run.variant, "seed": run.config.seed} | result
    write_json(run.folder / RESULT_FILE, without_nan(result))
    return result


def _train_and_measure(run: Run, corpus: Any) -> dict[str, Any]:
    from moe import MoEForCausalLM

    from ..train.torch_run import train
    from .measures.choices import router_metrics

    found = checkpoints(run.folder)
    trained = train(run.config, corpus, run.folder, resume=bool(found), quiet=True)
    if not math.isfinite(trained.held_out_bits_per_byte):
        raise FloatingPointError("held-out loss is not finite")
    model = MoEForCausalLM.from_pretrained(run.folder).eval()
    measured = router_metrics(
        model,
        corpus,
        sequence_length=run.config.sequence_length,
        max_tokens=min(run.config.held_out_tokens, 16_384),
        batch_size=run.config.batch_size,
    )
    return {"status": "finished", **asdict(trained), **measured, **_judged(model, corpus, run)}


def _judged(model: Any, corpus: Any, run: Run) -> dict[str, Any]:
    """Tasks made of the held-out text, and its domains if it has some."""
    from ..judging.domains import bits_by_domain
    from ..judging.tasks import cloze, copying

    length = run.config.sequence_length
    chosen, copied = (task(model, corpus, sequence_length=length) for task in (cloze, copying))
    return {
        "cloze": None if chosen is None else chosen.share,
        "copying": None if copied is None else copied.share - copied.chance,
        "domains": bits_by_domain(model, corpus, run.config),
    }


def _settings(run: Run) -> dict[str, Any]:
    """What makes a run this run besides its text, as it comes back from a JSON file."""
    return {"variant": run.variant, "config": plain(run.config)}


def expect_same(run: Run) -> None:
    """Raises ValueError if the folder of a run holds one with other settings."""
    begun, wanted = _read(run.folder / CONFIG_FILE), _settings(run)
    if begun is not None and (changed := differences(begun["config"], wanted["config"])):
        raise ValueError(f"{run.folder} holds a run with other settings ({changed}); use another --out or remove it")


def _read(path: Path) -> dict[str, Any] | None:
    """A JSON file of a run, if it is there."""
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); remove {path.parent} to run it anew") from error

"""judge: a finished run on held-out text, by domain and by task; what the run's page shows of it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from moe import MoEForCausalLM, adopt
from routing.ground.files import write_json

from ..train.description.config import TrainConfig
from ..train.run_folder import checkpoints, saved_config, saved_origin
from ..train.text.chosen import Text
from ..train.torch_run import evaluate
from ..train.watching.page import JUDGEMENT, write_run_page
from .domains import bits_by_domain
from .tasks import TaskResult, cloze, copying

ALL = "all of it"
"""The name of the held-out text as a whole, beside its domains."""


def judge(run: Path, text: Text | None = None, *, seed: int = 0) -> dict[str, Any]:
    """Score the model of a run; writes `judgement.json` beside it and its page anew.

    Args:
        run: folder of a finished run.
        text: another text than the run's own.
        seed: of the tasks' items.

    Returns:
        `domains`: held-out bits per byte by domain, the whole first. `tasks`: per task its `share` of right answers,
        the 95 % interval `low` to `high`, `chance` and `trials`. `text`: where the text is from.

    Raises:
        ValueError: if there is no finished run, or its text is not there.
    """
    config = _config(run)
    own = Text(**{name: value for name, value in saved_origin(run).items() if value is not None})
    corpus = (text or own).load()
    model = adopt(run).eval()
    if corpus.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"{corpus.source} is read as {corpus.vocab_size} tokens, the model knows {model.config.vocab_size}; "
            "give the tokenizer of the run"
        )
    length = config.sequence_length
    tasks = {
        "cloze": cloze(model, corpus, sequence_length=length, seed=seed),
        "copying": copying(model, corpus, sequence_length=length, seed=seed),
    }
    found = {
        "text": corpus.source,
        "domains": _domains(model, corpus, config),
        "tasks": {name: _as_row(result) for name, result in tasks.items() if result is not None},
    }
    write_json(run / JUDGEMENT, found)
    write_run_page(run)
    return found


def _config(run: Path) -> TrainConfig:
    found = checkpoints(run)
    if not found or not (run / "config.json").is_file():
        raise ValueError(f"{run} holds no finished run; train one, or continue it with --resume")
    return replace(saved_config(found[-1]), precision="float32")


def _domains(model: MoEForCausalLM, corpus: Any, config: TrainConfig) -> dict[str, float]:
    return {ALL: evaluate(model, corpus, config)} | bits_by_domain(model, corpus, config)


def _as_row(result: TaskResult) -> dict[str, float]:
    low, high = result.interval
    return {"share": result.share, "low": low, "high": high, "chance": result.chance, "trials": result.trials}

"""A run that is continued: its settings as they were begun, unless what is said now contradicts them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..presets import PRESETS, preset, with_steps
from ..run_folder import backend_of, expect_same_settings, saved_config, saved_origin
from ..text.chosen import Text
from .config import TrainConfig
from .description import RunDescription, described


def continued(
    out: Path, checkpoint: Path, file: Path | None, settings: Sequence[str], options: Mapping[str, Any]
) -> RunDescription:
    """The run as it was begun, with the text that it was begun on.

    Args:
        out: folder of the run.
        checkpoint: its last one.
        file, settings, options: as for `described`.

    Raises:
        ValueError: if what was said contradicts it.
    """
    backend = _expect_backend(options["backend"], backend_of(checkpoint), out)
    begun = replace(saved_config(checkpoint), backend=backend, mesh=None)
    begun = replace(begun, mesh=options["mesh"] or (saved_config(checkpoint).mesh if backend == "jax" else None))
    if file is not None or settings or options["params"] or options["start_from"]:
        wanted = described(file, settings, {**options, "backend": None, "mesh": None})
        expect_same_settings(out, begun, as_shared_out(wanted.config, begun))
        text = wanted.text
    else:
        asked = Asked(**{name: options[name] for name in ("preset", "router", "steps", "seed")})
        asked.continued(out, begun)
        text = Text(**{name: options[name] for name in ("data", "tokenizer")}, column=options["column"] or "text")
    saved = saved_origin(out)
    own = {name: options[name] or saved.get(name) or getattr(text, name) for name in ("data", "column", "tokenizer")}
    return RunDescription(text=Text(**own), config=begun)


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What the user said about a run that is continued; None where nothing was said.

    Args:
        preset, router: names.
        steps: optimiser steps, 1 or more.
        seed: of initialisation and data order.
    """

    preset: str | None
    router: str | None
    steps: int | None
    seed: int | None

    def continued(self, run: Path, begun: TrainConfig) -> TrainConfig:
        """The run as it was begun. Raises ValueError if what was said contradicts it."""
        wanted = begun
        if self.preset is not None:
            wanted = with_steps(replace(preset(self.preset), seed=begun.seed), begun.steps)
            wanted = replace(wanted, model=self._model(begun.model, [wanted.model]))
        elif self.router is not None:
            wanted = replace(begun, model=self._model(begun.model, [PRESETS[name]().model for name in PRESETS]))
        wanted = replace(
            wanted,
            steps=begun.steps if self.steps is None else self.steps,
            seed=begun.seed if self.seed is None else self.seed,
        )
        expect_same_settings(run, begun, as_shared_out(wanted, begun))
        return begun

    def _model(self, begun: dict[str, Any], bases: list[dict[str, Any]]) -> dict[str, Any]:
        """The model's settings of the run if they can be what was said, of one of these presets; else what was said."""
        if self.router is None:
            return begun if begun["hidden_size"] == bases[0]["hidden_size"] else bases[0]
        from ...variants.catalogue import expect_variant, model_overrides

        expect_variant(self.router)
        for base in bases:
            try:
                found = json.loads(json.dumps(model_overrides(self.router, base)))
            except ValueError:  # it does not fit that preset, so the run is of another one
                continue
            if found == begun:
                return begun
        return model_overrides(self.router, bases[0] if len(bases) == 1 else begun)


def _expect_backend(asked: str | None, begun: str, run: Path) -> str:
    if asked not in (None, begun):
        raise ValueError(f"{run} was trained by {begun}, not by {asked}; leave --backend out, or use another --out")
    return begun


def as_shared_out(wanted: TrainConfig, begun: TrainConfig) -> TrainConfig:
    """A run whose steps are cut into micro-batches as in one with as many sequences per step.

    How they are cut may come from the number of processes that the run began on.
    """
    if wanted.batch_size * wanted.accumulation != begun.batch_size * begun.accumulation:
        return wanted
    return replace(wanted, batch_size=begun.batch_size, accumulation=begun.accumulation)

"""A model judged in every case: what is stored for a case is written once, and so is what came of it."""

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from shutil import rmtree
from typing import Any

from routing.ground.files import write_json

from .cases import Case
from .models import Subject

# 4,096 rows for each expert that is visited as often as the others
CALIBRATION_TOKENS = 16_384
LENGTH = 256
"""Tokens of a sequence."""


class JudgedModel:
    """A model, and the judge of what becomes of it.

    Args:
        subject: the model and its texts.
        tokens: of held-out text to judge on.
        scratch: an empty folder for the judge.
    """

    def __init__(self, subject: Subject, tokens: int, scratch: Path) -> None:
        self._subject, self._tokens, self._scratch = subject, tokens, scratch
        self._folder, self._model = subject.folder, subject.model

    @cached_property
    def _inputs(self) -> Any:
        """What its experts see while it reads the calibration text; read once, and only if a case is not judged yet."""
        from offload import calibrate

        return calibrate(
            self._model,
            self._subject.calibration,
            self._folder / "inputs",
            tokens=CALIBRATION_TOKENS,
            length=LENGTH,
            needs_sensitivity=True,
        )

    @cached_property
    def _judge(self) -> Any:
        from offload import Contestant, Judge

        reference = Contestant(path_or_id=self._model)
        return Judge(reference, self._subject.held_out, self._scratch, tokens=self._tokens)

    def found(self, case: Case) -> dict[str, Any]:
        """What a way to store experts costs."""
        kept = self._folder / f"{case.name}.{self._tokens}.json"
        if not kept.is_file():
            write_json(kept, self._judged(case))
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
            "fallbacks": found["fallbacks"],
        }

    def _judged(self, case: Case) -> dict[str, Any]:
        from offload import Contestant

        told: dict[str, Any] = {"expected_divergence": "", "fallbacks": 0}
        if case.is_theirs:
            from .k_quants import write_twin

            twin = self._folder / case.stored
            inputs = self._inputs if case.method == "importance" else None
            bits = write_twin(self._model, twin, case.form, inputs)
            judged = self._judge.judge(Contestant(path_or_id=twin))
            rmtree(twin)
            return {**judged.as_json(), **told, "bits_per_weight": bits}
        file = self._folder / f"{case.stored}.pack"
        # a copy is left for the other depths of it, which its index stands for
        if not file.with_name(f"{file.name}.json").is_file():
            told |= self._written(case, file)
        judged = self._judge.judge(Contestant(path_or_id=self._model, pack=file, depth=case.depth))
        return {**judged.as_json(), **told}

    def _written(self, case: Case, target: Path) -> Mapping[str, Any]:
        """Write a packed copy; gives what was expected of it, and how many experts fell back to rounding."""
        from offload import quantise, quantise_in_levels, quantise_to_bits, quantise_to_ternary

        if case.bits is not None:
            choice = quantise_to_bits(self._model, target, case.bits, method=case.method, inputs=self._inputs)
            return {"expected_divergence": choice.cost}
        if case.method == "levels":
            quantise_in_levels(self._model, target, form=case.form)
            return {}
        if case.form == "ternary":
            inputs = self._inputs if case.method == "gptq" else None
            methods = quantise_to_ternary(self._model, target, inputs=inputs)
        else:
            methods = quantise(self._model, target, form=case.form, method=case.method, inputs=self._inputs)
        return {"fallbacks": sum(count for method, count in methods.items() if method != case.method)}

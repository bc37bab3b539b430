"""Models whose experts are stored in fewer bits: trained here, one for each seed, or one that is given."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ...train.presets import TrainConfig, e16

# small enough for a core to train in minutes, with as many experts as quantising by usage needs
MIXTURE = {
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
TEXT_BYTES = 1 << 18
"""Of each text that is written: more than is read to calibrate or to judge."""


@dataclass(frozen=True)
class Subject:
    """A model and its texts.

    Args:
        seed: of its training.
        folder: keeps everything about it.
        model: its checkpoint, in bfloat16.
        calibration: text that its training saw.
        held_out: text that it did not.
    """

    seed: int
    folder: Path
    model: Path
    calibration: Path
    held_out: Path


def _mixture() -> TrainConfig:
    return TrainConfig(
        model=MIXTURE,
        steps=1,
        batch_size=BATCH,
        sequence_length=SEQUENCE,
        learning_rate=3e-3,
        precision="float32",
        held_out_tokens=32_768,
    )


def _e16() -> TrainConfig:
    """At its own rate, in smaller batches; normed over the full width, as a family of transformers has it."""
    config = e16()
    return replace(
        config,
        model={**config.model, "qk_norm": "full"},
        batch_size=BATCH,
        sequence_length=SEQUENCE,
        held_out_tokens=32_768,
    )


PRESETS: Mapping[str, Callable[[], TrainConfig]] = {"mixture": _mixture, "e16": _e16}
"""What is trained, by name."""


def trained(folder: Path, preset: str, seed: int, steps: int, data: Path | None) -> Subject:
    """A model in bfloat16 as a family of transformers; a run that was interrupted goes on.

    Args:
        folder: keeps the run.
        preset: one of PRESETS.
        seed: of weights and order.
        steps: optimiser steps, at least 40.
        data: text; None for the sources of the standard library.
    """
    from moe import MoEForCausalLM, export, save_byte_tokenizer

    from ...train.corpus import load_corpus
    from ...train.torch_run import train

    found = Subject(seed, folder, folder / "model", *_texts(folder, data))
    if (found.model / "config.json").is_file():
        return found
    every = max(steps // 20, 1)
    config = replace(
        PRESETS[preset](),
        steps=steps,
        warmup_steps=WARM_UP,
        evaluate_every=steps,
        checkpoint_every=every,
        seed=seed,
    )
    train(config, load_corpus(data), folder / "run", resume=(folder / "run").is_dir())
    part = folder / "model.part"
    export(MoEForCausalLM.from_pretrained(folder / "run"), "olmoe").bfloat16().save_pretrained(part)
    save_byte_tokenizer(part)
    part.rename(found.model)
    return found


def given(folder: Path, model: Path, data: Path | None) -> Subject:
    """A model that is there."""
    return Subject(0, folder, model, *_texts(folder, data))


def _texts(folder: Path, data: Path | None) -> tuple[Path, Path]:
    """Text that training sees and text that it does not, written once."""
    from ...train.corpus import load_corpus

    calibration, held_out = folder / "seen.txt", folder / "held-out.txt"
    if not held_out.is_file():
        corpus = load_corpus(data)
        folder.mkdir(parents=True, exist_ok=True)
        for file, stream in ((calibration, corpus.train), (held_out, corpus.held_out)):
            file.write_bytes(bytes(stream[:TEXT_BYTES]))
    return calibration, held_out

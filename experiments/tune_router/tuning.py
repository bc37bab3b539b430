"""Gate-only training: experts, attention and embeddings stay as they are, bit for bit.

Source of the idea: BUAA 2026 (ReMoE), arXiv:2605.27081: language-model loss, a locality term and a trust-region KL to
the router before.
"""

import json
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.optim import AdamW

from moe import load_model
from routing import REUSE_LOSSES, adjacent_reuse
from routing.ground.expect import expect_name
from routing.ground.files import write_json

from ..evidence.locality import locality_of
from ..train.checkpoint import STATE_FILE, CheckpointPlace, write_checkpoint
from ..train.corpus import BatchOrder, Corpus, load_corpus, windows
from ..train.loop import bits_per_byte, held_out_rows, prepare, run_steps
from ..train.presets import TrainConfig
from ..train.schedule import learning_rate
from .gates import Seen, routers_of, trace_of

GATES_FILE, BEFORE_FILE, REPORT_FILE = "training_gates.safetensors", "before_tuning.json", "tune_router.json"
TRACED_TOKENS = 8_192
"""Held-out tokens that reuse and hit rates are measured on: enough for a standard error below 0.01."""


@dataclass(frozen=True, kw_only=True)
class TuneOptions:
    """What gates are trained for.

    Args:
        loss: a key of `routing.REUSE_LOSSES`.
        weight: its coefficient, at least 0.
        anchor: coefficient of the KL divergence from the router before, at least 0.
        run: steps, batches, learning rate and seed; its model settings are not used.
    """

    loss: str
    weight: float
    anchor: float
    run: TrainConfig

    def __post_init__(self) -> None:
        expect_name(self.loss, REUSE_LOSSES, "reuse loss")
        for name in ("weight", "anchor"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ValueError(f"{name} must be a finite number of at least 0; got {getattr(self, name)}")


def text_for(folder: Path, data: str | None) -> Corpus:
    """A text in the tokens of a model: of the tokenizer in its folder, or bytes where there is none."""
    has_tokenizer = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))
    return load_corpus(data, tokenizer=str(folder) if has_tokenizer else None)


def tune_router(
    folder: Path, corpus: Corpus, out: Path, options: TuneOptions, *, resume: bool = False, quiet: bool = False
) -> dict[str, Any]:
    """Train the gates of a model; `out` becomes a checkpoint folder of the same family.

    Args:
        folder: a model of ours, or of a family whose routers are a softmax over a linear map.
        corpus: in the model's tokens.
        out: folder of the run, which becomes the checkpoint folder.
        options: loss, coefficients, steps.
        resume: continue after the last finished checkpoint, bit by bit.
        quiet: no progress bar.

    Returns:
        The report, also `<out>/tune_router.json`: `before` and `after` with `held_out_bits_per_byte`,
        `adjacent_reuse`, `srp`, `sch` and hit rates, and the options.

    Raises:
        ValueError: if the model cannot be read or has no such gates, its vocabulary is smaller than the text's, or
            `out` holds another run.
        FloatingPointError: if the loss is no longer finite.
    """
    stated = {"tuned": str(folder.absolute()), "loss": options.loss, "weight": options.weight, "anchor": options.anchor}
    config = replace(options.run, model=stated)
    found = prepare(out, config, corpus, resume=resume)
    tuned = _Tuning.of(folder, corpus, config, options, out)
    out.mkdir(parents=True, exist_ok=True)
    before = _before(out, tuned)
    done = tuned.restore(found[-1]) if found else 0
    run_steps(tuned, config, corpus, out, done, quiet=quiet)
    report = {"options": stated | {"steps": config.steps}, "before": before, "after": tuned.measure()}
    write_json(out / REPORT_FILE, report)
    return report


def _before(out: Path, tuned: "_Tuning") -> dict[str, Any]:
    """What the model was like; measured once, and kept for runs that are resumed."""
    if not (out / BEFORE_FILE).is_file():
        write_json(out / BEFORE_FILE, tuned.measure())
    return json.loads((out / BEFORE_FILE).read_text(encoding="utf-8"))


class _Tuning:
    """A `Trainable` whose optimiser has the gates alone."""

    def __init__(
        self, model: Any, dtype: torch.dtype, corpus: Corpus, config: TrainConfig, options: TuneOptions, out: Path
    ) -> None:
        self.model, self.dtype, self.corpus, self.config, self.options = model, dtype, corpus, config, options
        self.place = CheckpointPlace(out, config, corpus)
        self.routers = routers_of(model)
        model.requires_grad_(False)
        for parameter in self.routers.parameters.values():
            parameter.requires_grad_(True)
        self.optimizer = AdamW(self.routers.parameters.values(), lr=config.learning_rate, betas=config.betas)
        for group in self.optimizer.param_groups:
            group["weight_decay"] = 0.0
        self.order = BatchOrder(windows(corpus.train, config.sequence_length), config.batch_size, config.seed)

    @classmethod
    def of(cls, folder: Path, corpus: Corpus, config: TrainConfig, options: TuneOptions, out: Path) -> "_Tuning":
        """The model in float32, which a step of a gate needs; it is saved in its own dtype."""
        model = load_model(folder, dtype=torch.float32)
        vocabulary = model.get_input_embeddings().weight.shape[0]
        if corpus.vocab_size > vocabulary:
            raise ValueError(f"{folder} has {vocabulary} tokens, its text has ids up to {corpus.vocab_size - 1}")
        stored = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        name = str(stored.get("dtype") or stored.get("torch_dtype") or "float32")
        return cls(model, getattr(torch, name.removeprefix("torch.")), corpus, config, options, out)

    def step(self, number: int) -> dict[str, Any]:
        start, rate = time.perf_counter(), learning_rate(self.config, number)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        token_BS = torch.from_numpy(self.order.batch(number))
        output, seen = self.routers.watch(self.model, token_BS)
        lm_loss, reuse, anchor = _lm_loss(output.logits, token_BS), self._reuse(seen), torch.stack(seen.anchors).mean()
        loss = lm_loss + self.options.weight * reuse + self.options.anchor * anchor
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.routers.parameters.values(), self.config.clip_norm)
        if not torch.isfinite(loss + norm):
            raise FloatingPointError(f"diverged at step {number + 1}: loss {loss.item()}, gradient norm {norm.item()}")
        self.optimizer.step()
        self.optimizer.zero_grad()
        return {
            "step": number + 1,
            "loss": loss.item(),
            "lm_loss": lm_loss.item(),
            "reuse_loss": reuse.item(),
            "anchor_loss": anchor.item(),
            "adjacent_reuse": float(torch.stack([adjacent_reuse(stats) for stats in seen.stats]).mean()),
            "learning_rate": rate,
            "gradient_norm": norm.item(),
            "tokens_per_second": token_BS.numel() / (time.perf_counter() - start),
        }

    def evaluate(self) -> float:
        return self._judged(self.config.held_out_tokens)[0]

    def measure(self) -> dict[str, Any]:
        """Loss on held-out text, and how cacheable its routing is."""
        bits, trace = self._judged(max(self.config.held_out_tokens, TRACED_TOKENS))
        return {"held_out_bits_per_byte": bits, **locality_of(trace)}

    @torch.no_grad()
    def _judged(self, tokens: int) -> tuple[float, Any]:
        rows = held_out_rows(self.corpus, replace(self.config, held_out_tokens=tokens))
        total, calls, sizes = 0.0, [], []
        for start in range(0, len(rows), self.config.batch_size):
            token_BS = torch.from_numpy(rows[start : start + self.config.batch_size].astype("int64"))
            output, seen = self.routers.watch(self.model, token_BS)
            total += _lm_loss(output.logits, token_BS).item() * len(token_BS)
            calls.append(seen.stats)
            sizes.append(len(token_BS))
        trace = trace_of(calls, sizes, source=type(self.model).__name__)
        return bits_per_byte(total / len(rows), self.corpus, rows), trace

    def save(self, done: int) -> Path:
        """Gates and optimiser; the whole model once all steps are done."""

        def write(folder: Path) -> None:
            folder.mkdir()
            gates = {name: parameter.detach().contiguous() for name, parameter in self.routers.parameters.items()}
            save_file(gates, folder / GATES_FILE)
            torch.save({"step": done, "optimizer": self.optimizer.state_dict()}, folder / STATE_FILE)
            if done == self.config.steps:
                self._save_model(folder)

        return write_checkpoint(self.place, done, write)

    def restore(self, checkpoint: Path) -> int:
        """Put the gates and the optimiser of a checkpoint back; its step."""
        try:
            gates = load_file(checkpoint / GATES_FILE)
            state = torch.load(checkpoint / STATE_FILE, weights_only=True)
            with torch.no_grad():
                for name, parameter in self.routers.parameters.items():
                    parameter.copy_(gates[name])
            self.optimizer.load_state_dict(state["optimizer"])
        except (OSError, KeyError, RuntimeError, ValueError) as error:
            raise ValueError(f"{checkpoint} cannot be continued ({error}); start anew in another --out") from error
        return int(state["step"])

    def _reuse(self, seen: Seen) -> Tensor:
        return torch.stack([REUSE_LOSSES[self.options.loss](stats) for stats in seen.stats]).mean()

    def _save_model(self, folder: Path) -> None:
        """As a checkpoint of its family, in the dtype that it was stored in: what was not trained keeps its bits."""
        parameters = {name for name, _ in self.model.named_parameters()}
        state = {
            name: tensor.to(self.dtype) if name in parameters else tensor
            for name, tensor in self.model.state_dict().items()
        }
        self.model.save_pretrained(folder, state_dict=state)
        described = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        write_json(folder / "config.json", described | {"dtype": str(self.dtype).removeprefix("torch.")})


def _lm_loss(logits: Tensor, token_BS: Tensor) -> Tensor:
    return cross_entropy(logits[:, :-1].flatten(0, 1).float(), token_BS[:, 1:].flatten())

"""`expertier bench starts`: tiny models started from trained ones by every command that does so, and trained on.

No parity gate: losses are compared, not times. Tests hold each command against what it starts from.
"""

import io
import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from rich.table import Table

from routing.ground.terminal import plain_console

from ..evidence.record import RECORDS, expect_records, save_record

if TYPE_CHECKING:
    from torch import Tensor

    from ..train.corpus import Corpus

# of the dense model: twenty like it train in minutes of one core
SIZES = {
    "vocab_size": 256,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
# small enough for three seeds of some twenty models in minutes of one core; the rate is not tuned
BATCH, LENGTH, HELD_ROWS = 8, 64, 96
# not tuned
RATE, WARM_UP = 2e-3, 20
# of the variant `copies`, which the others start from
EXPERTS = 8
DENSE_STARTS: dict[str, tuple[str, ...]] = {
    "copies": ("--experts", "8", "--top-k", "2"),
    "shards": ("--experts", "4", "--top-k", "2", "--granularity", "2"),
    "noise 0.1": ("--experts", "8", "--top-k", "2", "--noise", "0.1"),
    "drop 0.5": ("--experts", "8", "--top-k", "2", "--drop", "0.5"),
}
TASK_MERGES: dict[str, tuple[str, ...]] = {
    "average": ("--method", "average"),
    "ties 0.2": ("--method", "sparse-task-vectors", "--sparsify", "ties", "--density", "0.2"),
    "ties 1.0": ("--method", "sparse-task-vectors", "--sparsify", "ties", "--density", "1.0"),
    "dare 0.5": ("--method", "sparse-task-vectors", "--sparsify", "dare", "--density", "0.5"),
    "breadcrumbs 0.5": ("--method", "sparse-task-vectors", "--sparsify", "breadcrumbs", "--density", "0.5"),
}


def bench_starts(
    data: Annotated[str, typer.Option(help="Text to train on: a file, a folder, or stdlib.")] = "stdlib",
    other: Annotated[str | None, typer.Option(help="A text of another kind, for merged task vectors.")] = None,
    steps: Annotated[int, typer.Option(min=2, help="Optimiser steps of the dense model.")] = 300,
    more: Annotated[int, typer.Option(min=2, help="Steps of every model that starts from a trained one.")] = 60,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds 0, 1, ...")] = 3,
    record: Annotated[bool, typer.Option("--record", help="Keep the result under experiments/records.")] = False,
    records: Annotated[Path, typer.Option(help="Where records live.")] = RECORDS,
) -> None:
    """Bits per byte of models made by upcycle, merge, prune and convert, at the start and after some training.

    Example: `expertier bench starts --data book.txt --other sources --seeds 3 --record`
    """
    expect_records(records)
    from ..train.corpus import load_corpus

    texts = [load_corpus(text) for text in (data, *([other] if other else []))]
    rows = [row for seed in range(seeds) for row in _Starts(texts, seed, steps, more).rows()]
    _show(rows)
    if record:
        config = {"sizes": SIZES, "batch": BATCH, "length": LENGTH, "rate": RATE, "steps": steps, "more": more}
        typer.echo(f"record: {save_record('starting-points', rows, config=config, folder=records)}")


@dataclass(frozen=True, kw_only=True)
class Result:
    """One model.

    Args:
        seed: of everything.
        start: what it was made from.
        variant: how.
        bits_start, bits_end: bits per byte on held-out text, before and after training.
        bits_other: the same on the other text, before training; NaN without one.
        load_start, load_end: experts per token and layer; NaN for dense models.
        agreement: of pre-gates with ordinary gates; NaN for others.
    """

    seed: int
    start: str
    variant: str
    bits_start: float
    bits_end: float = math.nan
    bits_other: float = math.nan
    load_start: float = math.nan
    load_end: float = math.nan
    agreement: float = math.nan


class _Starts:
    """All models of one seed; every training sees the same batches."""

    def __init__(self, texts: "list[Corpus]", seed: int, steps: int, more: int) -> None:
        self.texts, self.seed, self.steps, self.more = texts, seed, steps, more

    def rows(self) -> Iterator[dict[str, Any]]:
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            for result in (*self._from_dense(folder), *self._from_experts(folder), *self._tasks(folder)):
                yield vars(result)

    def _from_dense(self, folder: Path) -> Iterator[Result]:
        import torch
        from transformers import AutoModelForCausalLM, LlamaConfig

        torch.manual_seed(self.seed)
        dense = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES))
        self._train(dense, self.steps, first=0).save_pretrained(folder / "dense")
        yield self._trained(folder / "dense", "dense", "dense")
        for name, options in DENSE_STARTS.items():
            made = folder / name.replace(" ", "-")
            command("upcycle", folder / "dense", *options, "--to", "expertier", "--seed", self.seed, "--out", made)
            keep = folder / "experts" if name == "copies" else None
            yield self._trained(made, "dense", name, keep)
        torch.manual_seed(self.seed)
        config = load(folder / "copies").config
        type(load(folder / "copies"))(config).save_pretrained(folder / "scratch")
        yield self._trained(folder / "scratch", "nothing", "scratch")

    def _from_experts(self, folder: Path) -> Iterator[Result]:
        source = folder / "experts"
        yield self._trained(source, "experts", "as it is")
        for name, options in {"nulls K=4": (), "nulls K=3": ("--top-k", "3")}.items():
            made = folder / name.replace(" ", "-")
            command("convert", source, "--to", "nulls", *options, "--out", made)
            yield self._trained(made, "experts", name)
        yield from self._pregates(folder, source)
        trace, text = folder / "trace.npz", folder / "text.txt"
        text.write_bytes(bytes(self.texts[0].train[:4096].tolist()))
        usage_trace(load(source), self._rows(self.texts[0], first=0)[:8]).save(trace)
        half = EXPERTS // 2
        fewer = {
            "prune at random": ("prune", source, "--keep", half, "--seed", self.seed),
            "prune by use": ("prune", source, "--keep", half, "--trace", trace),
            "merge by outputs": ("merge", source, "--method", "experts", "--keep", half, "--data", text),
            "merge by weights": (
                *("merge", source, "--method", "experts", "--keep", half),
                *("--similarity", "weights", "--trace", trace),
            ),
        }
        for name, arguments in fewer.items():
            made = folder / name.replace(" ", "-")
            command(*arguments, "--out", made)
            yield self._trained(made, "experts", name)

    def _pregates(self, folder: Path, source: Path) -> Iterator[Result]:
        import json

        import torch

        text, report, made = folder / "fit.txt", folder / "fit.json", folder / "pregates"
        text.write_bytes(bytes(self.texts[0].train[: 1 << 13].tolist()))
        options = ("--fit", text, "--tokens", 1 << 13, "--json", report)
        command("convert", source, "--to", "pregate", *options, "--out", made)
        agreement = json.loads(report.read_text())["agreement"]
        yield self._trained(made, "experts", "pre-gates fitted", agreement=agreement)
        model, torch_seed = load(made), torch.Generator().manual_seed(self.seed)
        with torch.no_grad():
            for layer in model.model.moe_layers[:-1]:
                layer.router.pre_gate.weight.normal_(std=0.02, generator=torch_seed)
        model.save_pretrained(folder / "random-gates")
        yield self._trained(folder / "random-gates", "experts", "pre-gates random")

    def _tasks(self, folder: Path) -> Iterator[Result]:
        if len(self.texts) < 2:
            return
        for number, name in enumerate(("tuned on the text", "tuned on the other")):
            model = self._train(load(folder / "dense"), self.more, first=self.steps, text=number)
            model.save_pretrained(folder / f"tuned-{number}")
            yield self._measured(folder / f"tuned-{number}", "dense", name)
        for name, options in TASK_MERGES.items():
            made = folder / name.replace(" ", "-")
            base = () if name == "average" else ("--base", folder / "dense")
            command("merge", folder / "tuned-0", folder / "tuned-1", *base, *options, "--out", made)
            yield self._measured(made, "dense", name)

    def _measured(self, folder: Path, start: str, variant: str) -> Result:
        model = load(folder)
        bits = [bits_per_byte(model, self._held(text)) for text in self.texts]
        return Result(seed=self.seed, start=start, variant=variant, bits_start=bits[0], bits_other=bits[1])

    def _trained(
        self, folder: Path, start: str, variant: str, keep: Path | None = None, agreement: float = math.nan
    ) -> Result:
        """Bits and loads before and after `more` steps; the trained model is saved to `keep`."""
        model, held = load(folder), self._held(self.texts[0])
        before = bits_per_byte(model, held), true_load(model, held)
        self._train(model, self.more, first=self.steps)
        if keep is not None:
            model.save_pretrained(keep)
            from moe import save_byte_tokenizer

            save_byte_tokenizer(keep)
        return Result(
            seed=self.seed,
            start=start,
            variant=variant,
            bits_start=before[0],
            bits_end=bits_per_byte(model, held),
            load_start=before[1],
            load_end=true_load(model, held),
            agreement=agreement,
        )

    def _train(self, model: Any, steps: int, first: int, text: int = 0) -> Any:
        """AdamW with warm-up and a cosine; the batch of a step depends on the seed and the step alone."""
        import torch

        model.train()
        torch.manual_seed(self.seed)
        optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1)
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = RATE * min((step + 1) / WARM_UP, 0.55 + 0.45 * math.cos(math.pi * step / steps))
            token_BS = self._rows(self.texts[text], first + step)
            model(token_BS, labels=token_BS).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        return model.eval()

    def _rows(self, corpus: "Corpus", first: int) -> "Tensor":
        import torch

        generator = np.random.default_rng([self.seed, first])
        starts = generator.integers(0, len(corpus.train) - LENGTH, BATCH)
        return torch.from_numpy(np.stack([corpus.train[s : s + LENGTH] for s in starts]).astype(np.int64))

    def _held(self, corpus: "Corpus") -> "Tensor":
        import torch

        rows = min(HELD_ROWS, len(corpus.held_out) // LENGTH)
        return torch.from_numpy(corpus.held_out[: rows * LENGTH].astype(np.int64)).view(rows, LENGTH)


def command(*arguments: object) -> None:
    """Run `expertier` with these arguments in this process; what it prints is left out."""
    import moe.cli

    with redirect_stdout(io.StringIO()):
        moe.cli.app([str(argument) for argument in arguments], standalone_mode=False)


def load(folder: Path) -> Any:
    """The model of a checkpoint folder."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


def bits_per_byte(model: Any, token_BS: "Tensor") -> float:
    """Mean over the predicted bytes."""
    import torch
    from torch.nn.functional import cross_entropy

    with torch.no_grad():
        logits = model(token_BS).logits[:, :-1].flatten(0, 1).float()
    return float(cross_entropy(logits, token_BS[:, 1:].flatten())) / math.log(2)


def true_load(model: Any, token_BS: "Tensor") -> float:
    """Experts per token, mean over layers; NaN for models without our routers."""
    import torch

    if model.config.model_type != "expertier":
        return math.nan
    with torch.no_grad():
        stats = model(token_BS).router_stats
    return sum(float(one.true_load) for one in stats) / len(stats)


def usage_trace(model: Any, token_BS: "Tensor") -> Any:
    """The routing of some text."""
    import torch

    from routing import RoutingTrace

    seen: list[Any] = []
    handles = [
        layer.experts.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[1].cpu().numpy()))
        for layer in model.model.moe_layers
    ]
    with torch.no_grad():
        model(token_BS)
    for handle in handles:
        handle.remove()
    expert_TLK = np.stack(seen, axis=1).astype(np.int16)
    sequence_T = np.repeat(np.arange(len(token_BS), dtype=np.int32), token_BS.shape[1])
    return RoutingTrace(expert_TLK=expert_TLK, sequence_T=sequence_T, metadata={"num_experts": EXPERTS})


def _show(rows: list[dict[str, Any]]) -> None:
    """Means over seeds, with half the range between the extreme seeds."""
    columns: dict[str, Callable[[float], str]] = {
        "bits_start": "{:.3f}".format,
        "bits_end": "{:.3f}".format,
        "bits_other": "{:.3f}".format,
        "load_start": "{:.2f}".format,
        "load_end": "{:.2f}".format,
        "agreement": "{:.2f}".format,
    }
    table = Table("from", "variant", *columns)
    for start, variant in dict.fromkeys((row["start"], row["variant"]) for row in rows):
        of_it = [row for row in rows if (row["start"], row["variant"]) == (start, variant)]
        cells = []
        for name, shown in columns.items():
            values = [row[name] for row in of_it]
            is_there = not any(math.isnan(value) for value in values)
            cells.append(f"{shown(np.mean(values))} ± {shown(np.ptp(values) / 2)}" if is_there else "")
        table.add_row(start, variant, *cells)
    plain_console().print(table)

"""`expertier bench finetune-domains`: an upcycled model tuned on two domains, its experts on the disk, and in memory.

No parity gate: losses are compared, not times. The resident run is a loop of transformers and torch alone, on the same
rows; how far both are apart is a column of the result.
"""

import sysconfig
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from routing.ground.expect import expect_there
from routing.ground.terminal import plain_console

from ...evidence.record import RECORDS, expect_records, save_record
from ..starting_points import command

if TYPE_CHECKING:
    from torch import Tensor

    from offload import PackedRows, TuneOptions

# of the dense model that is trained where none is given: a core trains it in a fraction of a minute; not tuned
SIZES = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
BASE_RATE, BASE_STEPS = 2e-3, 200
"""Of its training."""
DOMAIN_BYTES, HELD_ROWS = 200_000, 32
"""Read of each domain, far more than some dozens of steps see; and rows that its loss is measured on."""


def bench_domains(
    model: Annotated[
        Path | None, typer.Option("--model", help="A dense checkpoint or GGUF file, such as SmolLM2; else a tiny one.")
    ] = None,
    data: Annotated[
        list[Path] | None, typer.Option("--data", help="The text of a domain; give it twice. Else sources and prose.")
    ] = None,
    experts: Annotated[int, typer.Option("--experts", min=2, help="Copies of each feed-forward.")] = 8,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Optimiser steps on each domain.")] = 40,
    length: Annotated[int, typer.Option("--sequence-length", min=2, help="Tokens of a row.")] = 128,
    accumulation: Annotated[int, typer.Option("--accumulation", min=1, help="Micro-batches of 4 rows per step.")] = 2,
    rate: Annotated[float, typer.Option("--learning-rate", help="Of AdamW, in both.")] = 1e-3,
    slots: Annotated[int, typer.Option("--cache-experts", min=1, help="Slots per layer, of all --experts.")] = 2,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Seeds 0, 1, ...")] = 2,
    record: Annotated[bool, typer.Option("--record", help="Keep the result under experiments/records.")] = False,
    records: Annotated[Path, typer.Option(help="Where records live.")] = RECORDS,
) -> None:
    """Held-out loss of an upcycled model after `finetune --method full` on each of two domains, and after dense AdamW.

    Of a --model, everything is in memory for the resident run: 16 bytes per parameter of the upcycled one.

    Example: `expertier bench finetune-domains --seeds 3 --record`
    """
    if data is not None and len(data) != 2:
        raise ValueError(f"two domains are compared; got {len(data)} of --data")
    expect_there(model, *(data or ()))
    expect_records(records)
    from offload import TuneOptions

    options = TuneOptions(
        method="full",
        steps=steps,
        sequence_length=length,
        batch_size=4,
        accumulation=accumulation,
        learning_rate=rate,
        dtype="float32",
        checkpoint_every=steps,
    )
    texts = standard_domains() if data is None else {file.stem: file.read_bytes() for file in data}
    rows = []
    for seed in range(seeds):
        with tempfile.TemporaryDirectory() as folder:
            rows += _Seed(Path(folder), texts, options, seed, experts, slots).rows(model)
    _show(rows)
    if record:
        config = options.as_json() | {"model": str(model), "experts": experts, "cache_experts": slots}
        typer.echo(f"record: {save_record('finetune-domains', rows, config=config, folder=records)}")


def standard_domains() -> dict[str, bytes]:
    """Sources and prose that come with Python."""
    library = Path(sysconfig.get_paths()["stdlib"])
    sources = b"\n".join(file.read_bytes() for file in sorted((library / "asyncio").glob("*.py")))
    return {"sources": sources, "prose": (library / "pydoc_data" / "topics.py").read_bytes()}


@dataclass(frozen=True)
class _Seed:
    """All runs of one seed.

    Args:
        folder: where everything is written.
        texts: bytes by domain.
        options: of fine-tuning, but for the seed.
        seed: of the tiny model, the upcycling and the order of rows.
        experts, slots: copies of each feed-forward, and how many of a layer stay in memory.
    """

    folder: Path
    texts: Mapping[str, bytes]
    options: "TuneOptions"
    seed: int
    experts: int
    slots: int

    def rows(self, model: Path | None) -> list[dict[str, Any]]:
        """One row for each domain."""
        dense, upcycled = self.folder / "dense", self.folder / "upcycled"
        if model is None:
            self._train_dense(dense)
        elif model.is_file():
            import offload

            offload.dequantise(model, dense, dtype="float32")
        made_from = model if model is not None and model.is_dir() else dense
        sizes = ("--experts", self.experts, "--top-k", 2, "--noise", 0.05)
        command("upcycle", made_from, *sizes, "--seed", self.seed, "--out", upcycled)
        return [self._row(upcycled, name) for name in self.texts]

    def _row(self, upcycled: Path, name: str) -> dict[str, Any]:
        import dataclasses

        from offload import fine_tune

        from ...evidence.resident import load_resident

        options = dataclasses.replace(self.options, seed=self.seed)
        learnt, held = self._packed(upcycled, name)
        out = self.folder / f"tuned-{name}"
        own: list[float] = []
        fine_tune(
            *(upcycled, learnt, out, options),
            cache_experts=self.slots,
            advance=lambda row: own.append(row["loss"]),
        )
        resident = load_resident(upcycled, dtype="float32")
        start = loss_of(resident, held)
        theirs = train_resident(resident, learnt, options)
        return {
            "seed": self.seed,
            "domain": name,
            "loss_start": start,
            "loss_offloaded": loss_of(load_resident(out), held),
            "loss_resident": loss_of(resident, held),
            "furthest_step": max(abs(one - other) for one, other in zip(own, theirs, strict=True)),
        }

    def _packed(self, model: Path, name: str) -> "tuple[PackedRows, PackedRows]":
        """Rows to learn from, and some that are spread over the last tenth of a domain."""
        import numpy as np
        from transformers import AutoTokenizer

        from offload import PackedRows

        text = self.texts[name][:DOMAIN_BYTES].decode(errors="ignore")
        ids = np.array(AutoTokenizer.from_pretrained(model)(text)["input_ids"], np.int64)
        length = self.options.sequence_length
        token_NS = ids[: len(ids) // length * length].reshape(-1, length)
        learnt, held = np.split(token_NS, [len(token_NS) * 9 // 10])
        if not len(held):
            raise ValueError(f"the text of {name} has {len(ids)} tokens; give {10 * length} or more")
        held = held[:: -(-len(held) // HELD_ROWS)]
        return PackedRows(learnt, learnt, name), PackedRows(held, held, name)

    def _train_dense(self, out: Path) -> None:
        """A tiny llama that knows both domains a little."""
        import torch
        from transformers import AutoModelForCausalLM, LlamaConfig

        from moe import save_byte_tokenizer

        torch.manual_seed(self.seed)
        model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES))
        whole = bytearray(b"".join(text[:DOMAIN_BYTES] for text in self.texts.values()))
        text = torch.frombuffer(whole, dtype=torch.uint8)
        optimizer = torch.optim.AdamW(model.parameters(), lr=BASE_RATE)
        for _ in range(BASE_STEPS):
            starts = torch.randint(0, len(text) - self.options.sequence_length, (8,))
            token_BS = torch.stack([text[start : start + self.options.sequence_length] for start in starts]).long()
            model(input_ids=token_BS, labels=token_BS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        model.save_pretrained(out)
        save_byte_tokenizer(out)


def train_resident(model: Any, rows: "PackedRows", options: "TuneOptions") -> list[float]:
    """Dense AdamW of torch on a model in memory, on the rows that `finetune` sees; the losses of its steps."""
    import torch

    matrices = [value for value in model.parameters() if value.dim() >= 2]
    others = [value for value in model.parameters() if value.dim() < 2]
    groups = [{"params": matrices, "weight_decay": options.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=options.rate, betas=(options.beta1, options.beta2))
    losses = []
    for step in range(options.steps):
        batches, total = rows.batches(step, options), 0.0
        for ids, _ in batches:
            loss = mean_loss(model, ids) / len(batches)
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = options.rate_at(step + 1)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


def mean_loss(model: Any, token_BS: "Tensor") -> "Tensor":
    """Nats per token."""
    from torch.nn.functional import cross_entropy

    logits = model(input_ids=token_BS, use_cache=False).logits[:, :-1].float().flatten(0, 1)
    return cross_entropy(logits, token_BS[:, 1:].flatten())


def loss_of(model: Any, held: "PackedRows") -> float:
    """Nats per token of held-out rows."""
    import torch

    with torch.no_grad():
        return float(mean_loss(model, torch.from_numpy(held.token_NS)))


def _show(rows: list[dict[str, Any]]) -> None:
    names = list(rows[0])
    table = Table(*(name.replace("_", " ") for name in names))
    for row in rows:
        table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()))
    plain_console().print(table)

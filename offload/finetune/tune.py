"""`fine_tune`: a run from its settings to its result."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..checkpoint.gguf.head import is_gguf
from ..checkpoint.location import local_folder
from ..checkpoint.model_folder import read_config
from ..memory.collector import what_stays_left_out
from .examples import PackedRows, read_rows
from .methods.adapters import Adapters
from .methods.all_parameters import AllParameters
from .methods.forward_only import ForwardOnly
from .options import TuneOptions
from .peers import Alone, Peers
from .run import Tuning, begin, continue_from, full_disk_named, run_steps


def fine_tune(
    model: str | Path,
    data: str | Path | PackedRows,
    out: str | Path,
    options: TuneOptions,
    *,
    cache_experts: int | None = None,
    cpu_memory: str | int = "auto",
    resume: bool = False,
    advance: Callable[[dict[str, Any]], None] = lambda row: None,
    is_interrupted: Callable[[], bool] = lambda: False,
    peers: Peers | None = None,
) -> dict[str, Any]:
    """Fine-tune a model whose experts stay on disk; everything it leaves behind is under `out`.

    Args:
        model: a Hugging Face model folder, or a model id.
        data: a text, a `.jsonl` file of examples, a folder of either, or rows of tokens.
        out: the run's folder.
        options: method and settings.
        cache_experts: slots of each MoE layer instead of what a budget pays for.
        cpu_memory: the whole budget of the process, such as `"12GiB"`.
        resume: continue after the last commit, bit by bit as if nothing had happened.
        advance: told the metrics of each step.
        is_interrupted: asked after each step; if so the step is committed, and KeyboardInterrupt raised.
        peers: the processes that do the run together, `options.processes` of them; None for this one alone.

    Returns:
        The metrics of the last step; empty if none was left.

    Raises:
        ValueError: for bad settings, examples or folders, a damaged checkpoint, or too small a budget.
        FloatingPointError: if the loss is no longer finite.
        OSError: if the disk is full; the run is intact up to its last commit.
    """
    folder, out = local_folder(model), Path(out)
    if is_gguf(folder):
        raise ValueError(
            f"model {folder}: a GGUF file cannot be fine-tuned; take the safetensors checkpoint that it is of"
        )
    vocabulary = int(read_config(folder).get_text_config().vocab_size)
    rows = data if isinstance(data, PackedRows) else read_rows(data, folder, vocabulary, options.sequence_length)
    peers = peers or Alone()
    if peers.count != options.processes:
        raise ValueError(f"the run is of {options.processes} processes; {peers.count} were started")
    with full_disk_named(out):
        is_writer = peers.number == 0
        begun = begin(out, options, str(model), rows.fingerprint, resume=resume) if is_writer else None
        found = peers.gather(begun)[0]
        tuning = _open(model, out, options, rows, peers, cache_experts=cache_experts, cpu_memory=cpu_memory)
        try:
            done = continue_from(tuning, found)
            with what_stays_left_out():
                return run_steps(tuning, options, out, done, advance, is_interrupted, peers)
        finally:
            tuning.close()


def _open(model: str | Path, out: Path, options: TuneOptions, rows: PackedRows, peers: Peers, **memory: Any) -> Tuning:
    if options.method == "zo":
        return ForwardOnly(model, out, options, rows, peers=peers, **memory)
    return {"lora": Adapters, "full": AllParameters}[options.method](model, out, options, rows, **memory)

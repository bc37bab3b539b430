"""What the experts of a model see while it reads a text: their inputs, on disk, and how the router weighed them.

The model runs offloaded, once. Inputs go to a scratch folder, a file for each layer, so that memory does not grow with
the text. Afterwards the rows of one expert at a time are read back.

Shapes: T tokens, K experts per token, N rows of one expert, D model width, C inputs of any matrix, E experts.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from routing.ground.files import write_json

from ..checkpoint.experts import experts_modules
from ..serve.recording import only_last_logits

DONE_NAME = "inputs.json"
MOST_ROWS = 4096
"""Rows of one expert that are read back: a second moment of some thousand inputs changes little with more."""


@dataclass(frozen=True)
class ExpertRows:
    """The inputs of one expert.

    Args:
        x_NC: float32.
        weight_N: what the router weighed each with.
        num_seen: rows that there were, of which these are a random part.
    """

    x_NC: torch.Tensor
    weight_N: torch.Tensor
    num_seen: int

    def through(self, matrix: Callable[[torch.Tensor], torch.Tensor]) -> "ExpertRows":
        """The same rows after a function."""
        return ExpertRows(matrix(self.x_NC), self.weight_N, self.num_seen)


class RecordedInputs:
    """The inputs that `record_inputs` left in a folder.

    Args:
        folder: where they are.

    Raises:
        ValueError: if the recording there is not complete.
    """

    def __init__(self, folder: Path) -> None:
        if not (folder / DONE_NAME).is_file():
            raise ValueError(f"{folder}: holds no complete recording of inputs")
        self._folder = folder
        self.about: dict[str, Any] = json.loads((folder / DONE_NAME).read_text(encoding="utf-8"))

    @property
    def num_tokens(self) -> int:
        """Of the text."""
        return int(self.about["tokens"])

    def rows(self, layer: int, expert: int, most: int = MOST_ROWS) -> ExpertRows:
        """Inputs of one expert, at most `most` of them, drawn with a fixed seed.

        Args:
            layer: number of the MoE layer.
            expert: its id.
            most: rows at most.
        """
        expert_TK, weight_TK = self.routing(layer)
        token_N, place_N = np.nonzero(expert_TK == expert)
        num_seen = len(token_N)
        if num_seen > most:
            kept = np.sort(np.random.default_rng((layer, expert)).choice(num_seen, most, replace=False))
            token_N, place_N = token_N[kept], place_N[kept]
        x_NC = torch.from_numpy(self._inputs(layer)[token_N]).view(torch.bfloat16).float()
        return ExpertRows(x_NC, torch.from_numpy(weight_TK[token_N, place_N]).float(), num_seen)

    def routing(self, layer: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Expert ids and combine weights of a layer, `[T, K]`."""
        if layer not in self._routing:
            self._routing.clear()
            shape = (-1, int(self.about["top_k"][layer]))
            self._routing[layer] = (
                np.fromfile(self._folder / f"{layer}.experts", np.int32).reshape(shape),
                np.fromfile(self._folder / f"{layer}.weights", np.float32).reshape(shape),
            )
        return self._routing[layer]

    def bias(self, layer: int, name: str, expert: int) -> torch.Tensor | float:
        """The bias of a matrix; 0 if it has none."""
        file = self._folder / f"{layer}.{name}_bias"
        if not file.is_file():
            return 0.0
        bias_EC = np.memmap(file, np.float32, "r").reshape(int(self.about["experts"][layer]), -1)
        return torch.from_numpy(bias_EC[expert].copy())

    @cached_property
    def _routing(self) -> dict[int, tuple[NDArray[np.int32], NDArray[np.float32]]]:
        return {}

    def _inputs(self, layer: int) -> NDArray[np.int16]:
        return np.memmap(self._folder / f"{layer}.inputs", np.int16, "r").reshape(-1, int(self.about["width"][layer]))


def record_inputs(
    model: Any,
    sequences: Iterable[list[int]],
    folder: Path,
    about: Mapping[str, Any],
    progress: Callable[[int], None] = lambda tokens: None,
) -> RecordedInputs:
    """Run a model and keep what its experts see; a recording that is complete is not made again.

    Args:
        model: of `load`.
        sequences: token ids; each is a sequence of its own.
        folder: where the files go.
        about: what tells this recording from another; JSON values.
        progress: told the tokens of each sequence.

    Raises:
        ValueError: if there is no text.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for file in folder.iterdir():
        file.unlink()
    modules = list(experts_modules(model).values())
    writers = [_Writer(folder, layer, module) for layer, module in enumerate(modules)]
    hooks = [module.register_forward_pre_hook(writer) for module, writer in zip(modules, writers, strict=True)]
    done, options = 0, only_last_logits(model)
    try:
        with torch.no_grad():
            for sequence in sequences:
                model(torch.tensor([sequence], device=model.device), use_cache=False, **options)
                done += len(sequence)
                progress(len(sequence))
    finally:
        for hook in hooks:
            hook.remove()
        for writer in writers:
            writer.close()
    if not done:
        raise ValueError("the data holds no text")
    found = {"width": [w.width for w in writers], "top_k": [w.top_k for w in writers], "tokens": done}
    experts = [int(module.num_experts) for module in modules]
    write_json(folder / DONE_NAME, {**about, **found, "experts": experts})
    return RecordedInputs(folder)


class _Writer:
    """Appends what one experts module is called with."""

    def __init__(self, folder: Path, layer: int, module: Any) -> None:
        self._files = [(folder / f"{layer}.{what}").open("wb") for what in ("inputs", "experts", "weights")]
        self.width = self.top_k = 0
        for name in ("gate_up_proj", "up_proj", "down_proj") if module.has_bias else ():
            if (bias_EC := getattr(module, f"{name}_bias", None)) is not None:
                bias_EC.detach().float().cpu().numpy().tofile(folder / f"{layer}.{name}_bias")

    def __call__(self, module: Any, arguments: tuple[torch.Tensor, ...]) -> None:
        x_TD, expert_TK, weight_TK = (each.detach().cpu() for each in arguments[:3])
        self.width, self.top_k = x_TD.shape[-1], expert_TK.shape[-1]
        wholes = (
            x_TD.reshape(-1, self.width).bfloat16().view(torch.int16),
            expert_TK.to(torch.int32),
            weight_TK.float(),
        )
        for file, whole in zip(self._files, wholes, strict=True):
            file.write(whole.contiguous().numpy().tobytes())

    def close(self) -> None:
        for file in self._files:
            file.close()

"""Recording of a routing trace while a model runs.

Shapes: T tokens of a call, L MoE layers, K experts per token, B sequences in a batch.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from routing.traces import EMPTY, RoutingTrace


class TraceRecorder:
    """Collects what each MoE layer is asked for, call by call; padding and zero-compute experts become -1.

    Args:
        num_layers: L, MoE layers of the model.
        num_experts: E of the widest layer; ids outside 0..E-1 become -1.
        metadata: JSON values that the trace keeps, such as the model's name.
    """

    def __init__(self, num_layers: int, num_experts: int, metadata: dict[str, Any]) -> None:
        self._num_layers, self._num_experts, self._metadata = num_layers, num_experts, metadata
        self._calls: list[tuple[NDArray[np.int16], NDArray[np.float16], NDArray[np.int32], NDArray[np.int32]]] = []
        self._tokens: list[NDArray[np.int32] | None] = []
        """Token ids of each call; None where it was given embeddings."""
        self._layers: dict[int, tuple[NDArray[np.int16], NDArray[np.float16]]] = {}
        self._sequence_T: NDArray[np.int32] | None = None
        self._position_T: NDArray[np.int32] | None = None
        self._token_T: NDArray[np.int32] | None = None
        self._keep_T: NDArray[np.bool_] | None = None
        self._lengths_B: NDArray[np.int32] = np.zeros(0, np.int32)
        self._next_sequence = 0
        self._before: tuple[int, NDArray[np.int32]] | None = None
        """Sequences and lengths before the call that is going on; None between calls."""

    def begin_call(
        self,
        batch: int,
        length: int,
        past: int,
        mask_BS: NDArray[np.bool_] | None,
        token_BS: NDArray[np.int32] | None = None,
    ) -> None:
        """A call of the model starts: `batch` sequences of `length` new tokens after `past` cached ones."""
        self._leave_out_what_was_cut_short()
        self._finish_call()
        self._before = (self._next_sequence, self._lengths_B)
        if past == 0 or batch != len(self._lengths_B):
            self._next_sequence += len(self._lengths_B)
            self._lengths_B = np.zeros(batch, np.int32)
        keep_BS = np.ones((batch, length), bool) if mask_BS is None else mask_BS[:, -length:]
        position_BS = self._lengths_B[:, None] + np.cumsum(keep_BS, axis=1, dtype=np.int32) - 1
        sequence_BS = np.repeat(self._next_sequence + np.arange(batch, dtype=np.int32)[:, None], length, axis=1)
        self._lengths_B = self._lengths_B + keep_BS.sum(axis=1, dtype=np.int32)
        self._keep_T, self._position_T = keep_BS.reshape(-1), position_BS.reshape(-1).astype(np.int32)
        self._sequence_T = sequence_BS.reshape(-1)
        self._token_T = None if token_BS is None else token_BS.reshape(-1)

    def end_call(self) -> None:
        """The call has given its result; without this, what it noted is left out."""
        self._finish_call()
        self._before = None

    def _leave_out_what_was_cut_short(self) -> None:
        if self._before is not None:
            self._layers.clear()
            (self._next_sequence, self._lengths_B), self._before = self._before, None

    def note(self, layer: int, expert_TK: torch.Tensor, weight_TK: torch.Tensor) -> None:
        """One layer's routing of the call that has begun.

        A layer that is asked again in the same call (chains, recursions) gets more slots; where it is asked for some of
        the tokens only, which ones is not known here, and the trace keeps the first time.
        """
        ids = expert_TK.cpu().numpy().astype(np.int16)
        ids = np.where((ids >= 0) & (ids < self._num_experts), ids, np.int16(EMPTY))
        weights = weight_TK.float().cpu().numpy().astype(np.float16)
        if layer in self._layers:
            first_ids, first_weights = self._layers[layer]
            if len(first_ids) != len(ids):
                return
            ids, weights = np.concatenate([first_ids, ids], axis=1), np.concatenate([first_weights, weights], axis=1)
        self._layers[layer] = (ids, weights)

    def trace(self) -> RoutingTrace:
        """Everything recorded so far.

        Raises:
            ValueError: if nothing was recorded.
        """
        self._leave_out_what_was_cut_short()
        self._finish_call()
        if not self._calls:
            raise ValueError("nothing was recorded yet; run the model first")
        width = max(call[0].shape[2] for call in self._calls)
        return RoutingTrace(
            expert_TLK=np.concatenate([_pad(call[0], width, EMPTY) for call in self._calls]),
            weight_TLK=np.concatenate([_pad(call[1], width, 0) for call in self._calls]),
            sequence_T=np.concatenate([call[2] for call in self._calls]),
            position_T=np.concatenate([call[3] for call in self._calls]),
            token_T=self._all_tokens(),
            metadata={**self._metadata, "num_experts": self._num_experts},
        )

    def _all_tokens(self) -> NDArray[np.int32] | None:
        known = [token_T for token_T in self._tokens if token_T is not None]
        return np.concatenate(known) if len(known) == len(self._tokens) else None

    def _finish_call(self) -> None:
        layers, self._layers = self._layers, {}
        if not layers:
            return
        num_tokens = max(ids.shape[0] for ids, _ in layers.values())
        width = max(ids.shape[1] for ids, _ in layers.values())
        expert_TLK = np.full((num_tokens, self._num_layers, width), EMPTY, np.int16)
        weight_TLK = np.zeros((num_tokens, self._num_layers, width), np.float16)
        for layer, (ids, weights) in layers.items():
            if ids.shape[0] == num_tokens:
                expert_TLK[:, layer, : ids.shape[1]] = ids
                weight_TLK[:, layer, : ids.shape[1]] = weights
        keep_T, sequence_T, position_T = self._keep_T, self._sequence_T, self._position_T
        token_T = self._token_T
        if keep_T is None or sequence_T is None or position_T is None or len(keep_T) != num_tokens:
            keep_T = np.ones(num_tokens, bool)
            sequence_T = np.full(num_tokens, self._next_sequence, np.int32)
            position_T, token_T = np.arange(num_tokens, dtype=np.int32), None
        self._calls.append((expert_TLK[keep_T], weight_TLK[keep_T], sequence_T[keep_T], position_T[keep_T]))
        self._tokens.append(None if token_T is None else token_T[keep_T])


def _pad(array: NDArray[Any], width: int, fill: int) -> NDArray[Any]:
    return np.pad(array, ((0, 0), (0, 0), (0, width - array.shape[2])), constant_values=fill)

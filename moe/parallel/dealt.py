"""Experts dealt to processes: process 0 runs a model, and asks each other process for the rows of its experts.

A product comes back unweighted, one row for each slot of a token. Process 0 weighs and adds them in the order of the
slots, in the operations of a process that has all experts. So bits depend neither on the number of processes nor on
who has which expert. The price are K rows back where a weighted sum would be one.

All messages are one header of integers and one block of bytes. A connection that breaks ends the wait at once.

Shapes: T tokens, K slots, E experts, D model width, G processes, M rows that a process receives, N rows of
products that come back.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, distributed, nn

Compute = Callable[[int, Tensor, Tensor], Tensor]
STOP, REPORT = -1, -2
"""In place of a layer: the end, and a question for what a process has done."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
HEADER = 5
"""Layer, M, N, D, and the place of the dtype in `DTYPES`."""
ID_BYTES = 4
"""Of a row's number and of an expert's: both travel as int32."""
LENGTH_BYTES = 8
"""Before the rows of an answer: how long the text of a failure is, 0 if there is none."""


class LostProcess(ConnectionError):
    """Another process of the group has ended, or can no longer be reached."""


class ExpertFailure(RuntimeError):
    """Another process could not compute its experts; the text is its own."""


@contextmanager
def _with(rank: int) -> Iterator[None]:
    """Exchange something with a process. Raises LostProcess if it is gone."""
    try:
        yield
    except RuntimeError as error:
        raise LostProcess(f"process {rank} has ended, and its experts with it") from error


def _send(rank: int, group: distributed.ProcessGroup, *tensors: Tensor) -> None:
    with _with(rank):
        for tensor in tensors:
            distributed.send(tensor, rank, group=group)


def _receive(rank: int, group: distributed.ProcessGroup, count: int, dtype: torch.dtype) -> Tensor:
    found = torch.empty(count, dtype=dtype)
    with _with(rank):
        distributed.recv(found, rank, group=group)
    return found


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def _as_bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray(text.encode() or b" "), dtype=torch.uint8)


class Questions:
    """Process 0's side of the exchange.

    Args:
        group: the processes; this is the first of them.
    """

    def __init__(self, group: distributed.ProcessGroup) -> None:
        self.group, self._is_between = group, True

    @contextmanager
    def exchange(self) -> Iterator[None]:
        """Within, questions are open; an exception that leaves some of them open makes `stop` say nothing."""
        self._is_between = False
        yield
        self._is_between = True

    def ask(self, rank: int, layer: int, x_MD: Tensor, row_N: Tensor, expert_N: Tensor) -> None:
        """Ask a process for slots of its experts.

        Args:
            rank: whom to ask, 1 to G - 1.
            layer: number of the MoE layer.
            x_MD: rows.
            row_N, expert_N: the row and the expert of each slot.
        """
        header = [layer, len(x_MD), len(row_N), x_MD.shape[1], DTYPES.index(x_MD.dtype)]
        number_2N = torch.stack([row_N, expert_N]).int().cpu()
        _send(rank, self.group, torch.tensor(header), torch.cat([_bytes(number_2N), _bytes(x_MD.cpu())]))

    def answer(self, rank: int, slots: int, x_MD: Tensor) -> Tensor | ExpertFailure:
        """What a process found: [N, D] in the dtype of the rows, or why it could not."""
        size = slots * x_MD.shape[1] * x_MD.element_size()
        block = _receive(rank, self.group, LENGTH_BYTES + size, torch.uint8)
        length = int(block[:LENGTH_BYTES].view(torch.int64))
        if length:
            text = _receive(rank, self.group, length, torch.uint8)
            return ExpertFailure(f"process {rank}: {bytes(text.tolist()).decode()}")
        return block[LENGTH_BYTES:].view(x_MD.dtype).view(slots, -1).to(x_MD.device)

    def reports(self) -> list[str]:
        """What every other process says of itself."""
        found = []
        with self.exchange():
            for rank in range(1, self.group.size()):
                _send(rank, self.group, torch.tensor([REPORT, *[0] * (HEADER - 1)]))
                length = int(_receive(rank, self.group, 1, torch.int64))
                found.append(bytes(_receive(rank, self.group, length, torch.uint8).tolist()).decode())
        return found

    def stop(self) -> None:
        """End the others, unless an exception tore this process out of an exchange: they find out when it ends."""
        for rank in range(1, self.group.size()) if self._is_between else ():
            with suppress(LostProcess):
                _send(rank, self.group, torch.tensor([STOP, *[0] * (HEADER - 1)]))


class DealtExperts:
    """Takes the place of an experts module's forward on process 0.

    Args:
        experts: computes any of this process's experts that it is asked for.
        layer: number of the MoE layer, the same on all processes.
        rank_E: int64 the process that computes each expert.
        questions: to the others.
    """

    def __init__(self, experts: nn.Module, layer: int, rank_E: Tensor, questions: Questions) -> None:
        self._compute, self._layer, self._questions = experts.forward, layer, questions
        # ids from E on are empty slots; nobody has them
        self._rank_R = torch.cat([rank_E, torch.tensor([-1])])
        experts.forward = self

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        (T, D), K = hidden_states.shape, top_k_index.shape[1]
        rank_TK = self._rank_R[top_k_index.cpu().clamp(max=len(self._rank_R) - 1)]
        own, *others = ((rank_TK == rank).nonzero(as_tuple=True) for rank in range(self._questions.group.size()))
        asked = {rank: place for rank, place in enumerate(others, start=1) if len(place[0])}
        y_TKD = hidden_states.new_zeros(T, K, D)
        with self._questions.exchange():
            for rank, (token_N, slot_N) in asked.items():
                token_M, row_N = token_N.unique(return_inverse=True)
                expert_N = top_k_index[token_N, slot_N]
                self._questions.ask(rank, self._layer, hidden_states[token_M], row_N, expert_N.cpu())
            found: dict[int, Tensor | ExpertFailure] = {}
            try:
                if len(own[0]):
                    ids_N1 = top_k_index[own][:, None]
                    y_TKD[own] = self._compute(hidden_states[own[0]], ids_N1, _ones(len(ids_N1), top_k_weights))
            finally:
                # every question is answered before anything is raised, so that the next one meets its own answer
                for rank, place in asked.items():
                    found[rank] = self._questions.answer(rank, len(place[0]), hidden_states)
        for rank, place in asked.items():
            answer = found[rank]
            if isinstance(answer, ExpertFailure):
                raise answer
            y_TKD[place] = answer
        weighted_TKD = (y_TKD.flatten(0, 1) * top_k_weights.reshape(-1).unsqueeze(-1)).view(T, K, D)
        return weighted_TKD.sum(dim=1).to(hidden_states.dtype)


def _ones(rows: int, like: Tensor) -> Tensor:
    return like.new_ones(rows, 1)


@torch.no_grad()
def answer_questions(compute: Compute, report: Callable[[], str], group: distributed.ProcessGroup) -> None:
    """Compute what process 0 asks for until it says stop.

    Args:
        compute: (layer, rows [N, D], experts [N]) -> [N, D] in the rows' dtype, of one expert each.
        report: what this process says of itself when it is asked.
        group: the processes; this is not the first of them.

    Raises:
        LostProcess: if process 0 ends without a word.
    """
    while True:
        layer, rows, slots, width, number = _receive(0, group, HEADER, torch.int64).tolist()
        if layer == STOP:
            return
        if layer == REPORT:
            text = _as_bytes(report())
            _send(0, group, torch.tensor([len(text)]), text)
            continue
        dtype = DTYPES[number]
        ids = 2 * slots * ID_BYTES
        block = _receive(0, group, ids + rows * width * dtype.itemsize, torch.uint8)
        row_N, expert_N = block[:ids].view(torch.int32).view(2, slots).long()
        x_MD = block[ids:].view(dtype).view(rows, width)
        failure: tuple[Tensor, ...] = ()
        try:
            y_ND = compute(layer, x_MD[row_N], expert_N)
        except Exception as error:  # whatever it is, process 0 has to hear of it
            y_ND, failure = x_MD.new_zeros(slots, width), (_as_bytes(_told(error)),)
        length = torch.tensor([sum(map(len, failure))])
        _send(0, group, torch.cat([_bytes(length), _bytes(y_ND)]), *failure)


def _told(error: Any) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"

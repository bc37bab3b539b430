"""Tokens to the processes that hold their experts, and partial sums back.

`dispatch` sends a token once to every process that holds at least one of its experts, with the local ids and weights of
those experts; each process returns one weighted sum per row. That is the meaning of DeepEP's `dispatch` and `combine`,
whose transport can replace this one on GPUs. Ids >= E (dropped slots, zero-compute experts) are never sent.

Source: DeepSeek-AI (DeepEP), github.com/deepseek-ai/DeepEP, `ElasticBuffer.dispatch` and `combine`.

Shapes: T tokens, K slots, D model width, G processes, N rows that this process sends, M rows that it receives,
J = min(K, G) processes that a token can visit.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, distributed, nn
from torch.autograd.function import FunctionCtx
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.functional import pad
from transformers.distributed.expert_parallel import EPImplementation, EPImplementationInterface

from .traffic import Traffic

Compute = Callable[[Tensor, Tensor, Tensor], Tensor]
ID_BYTES = 4
"""Local expert ids travel as int32: a process holds fewer than 2^31 experts, and int64 would double their bytes."""


class _Exchange(torch.autograd.Function):
    """Rows to other processes; the gradient takes the way back."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: FunctionCtx, row_ND: Tensor, sent: list[int], received: list[int], group: distributed.ProcessGroup
    ) -> Tensor:
        ctx.way_back = (received, sent, group)  # type: ignore[attr-defined]
        return exchanged(row_ND, sent, received, group)

    @staticmethod
    def backward(ctx: FunctionCtx, grad_MD: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        return exchanged(grad_MD, *ctx.way_back), None, None, None  # type: ignore[attr-defined]


def exchanged(row_ND: Tensor, sent: Sequence[int], received: Sequence[int], group: distributed.ProcessGroup) -> Tensor:
    """Rows to other processes without gradient: `sent` to each, ordered by process, and `received` from each."""
    row_MD = row_ND.new_empty(sum(received), *row_ND.shape[1:])
    distributed.all_to_all_single(row_MD, row_ND.contiguous(), list(received), list(sent), group=group)
    return row_MD


@dataclass(frozen=True, kw_only=True, eq=False)
class Way:
    """Which rows this process sends where.

    Args:
        target_N, token_N: the process and the token of each row, ordered by process.
        place_TJ: which rows are each token's, by rising process; N for none.
        sent, received: rows to and from each process.
        num_slots: K of the process whose K is largest; routers with a variable number of experts differ in it.
    """

    target_N: Tensor
    token_N: Tensor
    place_TJ: Tensor
    sent: list[int]
    received: list[int]
    num_slots: int


def ways(rank_TK: Tensor, group: distributed.ProcessGroup) -> Way:
    """Which rows go where, once for each process among a token's slots; tells the others how many to expect."""
    sent_G2 = sent_counts(rank_TK, group.size())
    received_G2 = torch.empty_like(sent_G2)
    distributed.all_to_all_single(received_G2, sent_G2, group=group)
    return way_of(rank_TK, sent_G2, received_G2)


def sent_counts(rank_TK: Tensor, processes: int) -> Tensor:
    """[G, 2] what a process tells each other one: rows that it will send, and its K."""
    sent_G = _is_sent_TG(rank_TK, processes).sum(dim=0)
    return torch.stack([sent_G, torch.full_like(sent_G, rank_TK.shape[1])], dim=1)


def _is_sent_TG(rank_TK: Tensor, processes: int) -> Tensor:
    T, G = len(rank_TK), processes
    return rank_TK.new_zeros(T, G + 1, dtype=torch.bool).scatter_(1, rank_TK, True)[:, :G]


def way_of(rank_TK: Tensor, sent_G2: Tensor, received_G2: Tensor) -> Way:
    """Which rows go where, from what processes told each other."""
    (T, K), G = rank_TK.shape, len(sent_G2)
    is_sent_TG = _is_sent_TG(rank_TK, G)
    target_N, token_N = is_sent_TG.T.nonzero(as_tuple=True)
    place_TJ = rank_TK.new_full((T, min(K, G)), len(token_N))
    column_TG = is_sent_TG.cumsum(dim=1) - 1
    place_TJ[token_N, column_TG[token_N, target_N]] = torch.arange(len(token_N), device=rank_TK.device)
    # the one wait for the device of a layer: split sizes are numbers of the host
    sent, received, slots = torch.stack([sent_G2[:, 0], *received_G2.T]).tolist()
    return Way(
        target_N=target_N, token_N=token_N, place_TJ=place_TJ, sent=sent, received=received, num_slots=max(slots)
    )


def dispatch(
    x_TD: Tensor,
    rank_TK: Tensor,
    local_TK: Tensor,
    weight_TK: Tensor,
    compute: Compute,
    group: distributed.ProcessGroup,
    *,
    empty_id: int,
    traffic: Traffic | None = None,
) -> Tensor:
    """The weighted sum of every token's experts, wherever they are; all processes of the group call it together.

    Args:
        x_TD: this process's tokens.
        rank_TK: int64 process that computes each slot, 0..G-1; G for none.
        local_TK: int64 id of the expert on that process.
        weight_TK: combine weights, with gradient.
        compute: an experts forward of this process's experts: (rows, local ids, weights) -> weighted sums.
        group: the processes that exchange rows; G of them.
        empty_id: an id that contributes nothing on any process.
        traffic: counts what is moved, or None.

    Returns:
        [T, D] in the dtype of `x_TD`. A token's partial sums are added by rising process.
    """
    way = ways(rank_TK, group)
    id_NK, weight_NK = slots_of(way, rank_TK, local_TK, weight_TK, empty_id)
    id_MK = exchanged(id_NK, way.sent, way.received, group).long()
    x_MD = _Exchange.apply(x_TD[way.token_N], way.sent, way.received, group)
    weight_MK = _Exchange.apply(weight_NK, way.sent, way.received, group)
    if traffic is not None:
        note(traffic, way, x_TD, rank_TK, weight_TK, int((id_MK != empty_id).sum()))
    y_MD = computed(compute, x_MD, id_MK, weight_MK, empty_id)
    y_ND = _Exchange.apply(y_MD, way.received, way.sent, group)
    return added(y_ND, way).to(x_TD.dtype)


def slots_of(way: Way, rank_TK: Tensor, local_TK: Tensor, weight_TK: Tensor, empty_id: int) -> tuple[Tensor, Tensor]:
    """Local ids [N, K] as int32 and weights of each row; slots of other processes are empty."""
    missing = way.num_slots - rank_TK.shape[1]
    is_there_NK = rank_TK[way.token_N] == way.target_N[:, None]
    id_NK = torch.where(is_there_NK, local_TK[way.token_N], empty_id).int()
    weight_NK = torch.where(is_there_NK, weight_TK[way.token_N], 0.0)
    return pad(id_NK, (0, missing), value=empty_id), pad(weight_NK, (0, missing))


def added(y_ND: Tensor, way: Way) -> Tensor:
    """The sum of each token's rows, by rising process."""
    # a gather and a sum in fixed order: `index_add_` would add in any order on a GPU
    return torch.cat([y_ND, y_ND.new_zeros(1, y_ND.shape[1])])[way.place_TJ].sum(dim=1)


def note(traffic: Traffic, way: Way, x_TD: Tensor, rank_TK: Tensor, weight_TK: Tensor, computed_rows: int) -> None:
    """Count a dispatch of these tokens, of which this process computed so many (token, expert) pairs."""
    G = len(way.sent)
    row_bytes = 2 * x_TD.shape[1] * x_TD.element_size() + way.num_slots * (ID_BYTES + weight_TK.element_size())
    pair_G = torch.bincount(rank_TK.flatten(), minlength=G + 1)[:G]
    traffic.note(torch.tensor(way.sent), pair_G, row_bytes, computed_rows)


def computed(compute: Compute, x_MD: Tensor, id_MK: Tensor, weight_MK: Tensor, empty_id: int) -> Tensor:
    """What experts compute of rows, of which there may be none."""
    if len(x_MD):
        return compute(x_MD, id_MK, weight_MK)
    # a row of nothing keeps the experts in the graph, so that no process leaves the others waiting in backward
    row_1D, weight_1K = x_MD.sum(dim=0, keepdim=True), weight_MK.sum(dim=0, keepdim=True)
    return compute(row_1D, id_MK.new_full((1, id_MK.shape[1]), empty_id), weight_1K)[:0]


class RankDispatch(EPImplementation):
    """One row per (token, process); contiguous experts per process, as transformers splits them."""

    def __init__(self, experts: nn.Module, ep_mesh: DeviceMesh, tp_mesh: DeviceMesh) -> None:
        super().__init__(experts, ep_mesh, tp_mesh)
        if tp_mesh.size() > 1:
            raise ValueError(f"tensor parallelism beside experts is not supported; got {tp_mesh.size()} ranks")
        self.traffic = Traffic(num_ranks=ep_mesh.size(), rank=ep_mesh.get_local_rank())
        experts.traffic = self.traffic

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        S, G = self.num_local_experts, self.ep_mesh.size()
        rank_TK = torch.where(top_k_index < S * G, top_k_index // S, G)
        return dispatch(
            hidden_states,
            rank_TK,
            top_k_index % S,
            top_k_weights,
            self.experts_forward,
            self.ep_mesh.get_group(),
            empty_id=S,
            traffic=self.traffic,
        )


class PairDispatch(RankDispatch):
    """One row per (token, expert), as engines without fan-out-aware dispatch send; slots are added in their order."""

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        (T, D), K = hidden_states.shape, top_k_index.shape[1]
        x_ND = hidden_states[:, None].expand(T, K, D).flatten(0, 1)
        y_ND = super().__call__(x_ND, top_k_index.reshape(-1, 1), top_k_weights.reshape(-1, 1))
        return y_ND.view(T, K, D).sum(dim=1)


DISPATCHES = {"expertier": RankDispatch, "expertier_pairs": PairDispatch}
"""Under these names transformers' `DistributedConfig(ep_implementation=)` finds them."""
for _name, _implementation in DISPATCHES.items():
    EPImplementationInterface.register(_name, _implementation)

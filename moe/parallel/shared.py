"""Experts of a model that every process runs on the same tokens: each computes its own experts, all get every sum.

Products come back unweighted and are added in the order of the slots on every process, so the result does not depend on
how many processes there are, nor on who has which expert.

Shapes: T tokens, K slots, E experts, D model width, N rows of this process's experts.
"""

import torch
from torch import Tensor, distributed, nn


class SharedBatchExperts:
    """Takes the place of an experts module's forward; the module keeps whatever weights it has.

    Args:
        experts: computes any of its experts that it is asked for.
        rank_E: int64 the process that computes each expert.
        group: the processes; all call with the same tokens.
    """

    def __init__(self, experts: nn.Module, rank_E: Tensor, group: distributed.ProcessGroup) -> None:
        self._compute, self._group = experts.forward, group
        self._is_own_R = torch.cat([rank_E == group.rank(), torch.zeros(1, dtype=torch.bool)])
        experts.forward = self

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        (T, D), K = hidden_states.shape, top_k_index.shape[1]
        # ids from E on are empty slots; nobody has them
        is_own_TK = self._is_own_R[top_k_index.cpu().clamp(max=len(self._is_own_R) - 1)].to(top_k_index.device)
        token_N, slot_N = is_own_TK.nonzero(as_tuple=True)
        y_TKD = hidden_states.new_zeros(T, K, D)
        if len(token_N):
            id_N1 = top_k_index[token_N, slot_N][:, None]
            y_TKD[token_N, slot_N] = self._compute(hidden_states[token_N], id_N1, top_k_weights.new_ones(len(id_N1), 1))
        if self._group.size() > 1:
            # one process has a number and the others zero: no sum is rounded
            distributed.all_reduce(y_TKD, group=self._group)
        wide = torch.promote_types(y_TKD.dtype, top_k_weights.dtype)
        return torch.bmm(top_k_weights[:, None].to(wide), y_TKD.to(wide))[:, 0].to(hidden_states.dtype)

"""Grouping kernels against Python's stable sort."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from moe.kernels.grouped.metadata import group_rows, map_tiles
from moe.kernels.grouped.metadata_kernels import PADDING, UNUSED
from moe.kernels.launching.launch import execute

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.gpu


def check(expert_TK, slots, num_experts, num_slots, block_m):
    slot_E = None if slots is None else torch.tensor(slots, dtype=torch.int32, device=DEVICE)
    groups, tiles = group_rows(expert_TK.to(DEVICE), slot_E, num_experts, num_slots, block_m, execute)
    ids = expert_TK.flatten().tolist()
    table = list(range(num_experts)) if slots is None else slots
    slot_of_row = [table[i] if 0 <= i < num_experts and table[i] >= 0 else num_slots for i in ids]
    order = sorted(range(len(ids)), key=slot_of_row.__getitem__)
    assert groups.order_N.tolist() == order
    computed = {row: place for place, row in enumerate(order) if slot_of_row[row] < num_slots}
    assert groups.position_N.tolist() == [computed.get(row, -1) for row in range(len(ids))]
    counts = [slot_of_row.count(slot) for slot in range(num_slots)]
    offsets = [sum(counts[:slot]) for slot in range(num_slots + 1)]
    assert groups.offset_C1.tolist() == offsets
    expected = [
        (slot, start) for slot in range(num_slots) for start in range(offsets[slot], offsets[slot + 1], block_m)
    ]
    expected += [(PADDING.value, start) for start in range(offsets[-1], len(ids), block_m)]
    for mapped in (tiles, map_tiles(groups, block_m, execute)):
        found = list(zip(mapped.slot_Q.tolist(), mapped.start_Q.tolist(), strict=True))
        assert found[: len(expected)] == expected
        assert all(slot == UNUSED.value for slot, _ in found[len(expected) :])


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_grouping_equals_a_stable_sort(data):
    num_experts = data.draw(st.integers(1, 9), label="experts")
    num_tokens = data.draw(st.integers(1, 20), label="tokens")
    ids = st.lists(st.integers(-1, num_experts + 2), min_size=num_tokens, max_size=num_tokens)
    expert_TK = torch.tensor([data.draw(ids), data.draw(ids)]).T.contiguous()
    check(expert_TK, None, num_experts, num_experts, block_m=data.draw(st.sampled_from([16, 32]), label="block_m"))


def test_many_blocks_of_rows_and_many_experts(guarded_memory):
    check(torch.randint(70, (171, 3)), None, 67, 67, block_m=16)


def test_slots_of_experts_that_lie_elsewhere(guarded_memory):
    check(torch.randint(7, (40, 2), dtype=torch.int32), [2, -1, 0, 3, -1, 1], 6, 5, block_m=16)


def test_one_expert_has_all_rows():
    check(torch.full((150, 1), 1), None, 3, 3, block_m=64)

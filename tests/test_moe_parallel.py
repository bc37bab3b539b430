"""Experts on several processes: dispatch against whole experts, copies that take turns, experts that move."""

import pytest
import torch

from moe.parallel import Copies, slice_of, stagger, weave
from tests.parallel_ranks import D, F, K, bank, copies_of
from tests.rank_processes import run_ranks


def test_dispatch_placement_migration_and_counts_on_two_processes(subtests):
    everyone = run_ranks(2, "parallel_ranks")
    for rank, found in enumerate(everyone):
        for name, errors in found["dispatched"].items():
            with subtests.test(f"outputs and gradients, {name}, process {rank}"):
                assert max(errors) < 1e-6
        for name, errors in found["models"].items():
            with subtests.test(f"logits of {name}, process {rank}"):
                assert max(errors) < 2e-6
        for name, is_equal in found["dealt"].items():
            with subtests.test(f"experts dealt to processes: bits of one process, {name}"):
                assert is_equal
        with subtests.test(f"outputs and gradients of experts in slices, process {rank}"):
            assert found["sliced"]["units"] == F // 2
            assert found["sliced"]["difference"] < 1e-6
        with subtests.test(f"outputs while experts move, process {rank}"):
            assert len(found["moved"]["errors"]) == 5
            assert max(found["moved"]["errors"]) < 1e-6
    with subtests.test("where experts are after they moved"):
        first, second = (found["moved"] for found in everyone)
        assert first["held"] == second["held"] == [[5, 1, 2, 4], [3, 4, None, 0]]
        assert first["most_held"] == [4, 4]
        assert (first["moved_bytes"], second["moved_bytes"]) == (first["expert_bytes"], 2 * first["expert_bytes"])
    with subtests.test("counts by hand"):
        first, second = (found["counted"] for found in everyone)
        # a row is there D floats, K ids of 4 bytes and K weights of 4; back it is D floats
        row_bytes = 2 * 4 * D + K * (4 + 4)
        assert first["rows"] == second["rows"] == [2, 2]
        assert first["pairs"] == [3, 3]
        assert (first["remote_rows"], first["remote_bytes"]) == (2, 2 * row_bytes)
        assert first["computed"] == second["computed"] == 6


def test_copies_take_turns_by_their_shares():
    held = [[0, 1], [1, None, 2]]
    copies = Copies.of(held, torch.tensor([[1, 0], [1, 3], [0, 1]]))
    rank_TK, local_TK = copies.place(torch.tensor([[1, 1], [1, 1], [0, 2], [3, 1]]))
    assert rank_TK.tolist() == [[1, 0], [1, 1], [0, 1], [2, 1]]
    assert local_TK.tolist() == [[0, 1], [0, 0], [0, 2], [3, 0]]


def test_an_expert_without_a_turn_or_with_one_where_it_is_not_is_refused():
    with pytest.raises(ValueError, match=r"without one: \[1\]"):
        Copies.of([[0], []], torch.tensor([[1, 0], [0, 0]]))
    with pytest.raises(ValueError, match="needs a turn on a process that holds it"):
        Copies.of([[0], [1]], torch.tensor([[1, 1], [0, 1]]))
    assert copies_of([[0, 1, 2], [3, 4, 5]]).slots == 3


def test_slices_add_up_to_the_experts_and_one_slice_is_the_experts():
    x_TD, weight_TK = torch.randn(7, D), torch.rand(7, K)
    ids, whole = torch.stack([torch.randperm(6)[:K] for _ in range(7)]), bank()
    with torch.no_grad():
        expected = whole(x_TD, ids, weight_TK)
        assert torch.equal(slice_of(bank(), 0, 1)(x_TD, ids, weight_TK), expected)
        parts = [slice_of(bank(), part, 4)(x_TD, ids, weight_TK) for part in range(4)]
        torch.testing.assert_close(sum(parts), expected)
    with pytest.raises(ValueError, match=rf"must divide the {F} hidden units"):
        slice_of(bank(), 0, 3)


class Clock:
    """One process of several alike: its time, and when the connection is free; computation of a layer takes 1."""

    def __init__(self, parts, layers, exchange):
        self.now = self.free = 0.0
        self.layers, self.compute, self.rows = layers, 1 / parts, exchange / (2 * parts)

    def send(self):
        self.free = max(self.now, self.free) + self.rows
        return self.free

    def wait(self, landed):
        self.now = max(self.now, landed)

    def part(self, name):
        """The steps of `in_steps` through all layers."""
        for _ in range(self.layers):
            yield  # counts
            rows = self.send()
            yield
            self.wait(rows)
            self.now += self.compute
            results = self.send()
            yield
            self.wait(results)
        return name


def over_bound(order, parts, layers, exchange):
    clock = Clock(parts, layers, exchange)
    assert order([clock.part(name) for name in range(parts)]) == list(range(parts))
    return clock.now / (layers * max(1, exchange))


@pytest.mark.parametrize(("exchange", "halves"), [(0.5, 1.25), (1, 1.5), (2, 1.0)])
def test_four_parts_at_different_steps_reach_the_bound_and_halves_do_not(exchange, halves):
    assert over_bound(weave, 2, 6, exchange) == pytest.approx(halves, abs=0.01)
    assert over_bound(stagger, 4, 6, exchange) < 1.05
    assert over_bound(weave, 1, 6, exchange) == pytest.approx((1 + exchange) / max(1, exchange))
    assert over_bound(stagger, 1, 6, exchange) == over_bound(weave, 1, 6, exchange)


def test_parts_of_other_lengths_and_none_at_all_are_taken_to_their_ends():
    parts = [Clock(1, layers, 1).part(layers) for layers in (3, 0, 1, 5, 2)]
    assert stagger(parts) == [3, 0, 1, 5, 2]
    assert stagger([]) == weave([]) == []

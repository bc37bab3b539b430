"""Experts on several processes: dispatch against whole experts, copies that take turns, experts that move."""

import numpy as np
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


def steps_of(order, parts, layers):
    """The steps of `in_steps` of all parts, in the order in which every process takes them."""
    taken = []

    def part(number):
        for layer in range(layers):
            for step in ("counts", "rows", "results"):
                taken.append((step, number, layer))
                yield
        taken.append(("end", number, layers))
        return number

    assert order([part(number) for number in range(parts)]) == list(range(parts))
    return taken


def over_bound(order, parts, layers, exchange, unevenness=0.0, seed=0):
    """Time of two processes with a connection each, over the longer of computation, 1 per layer, and exchange.

    What a part computes in a layer takes longer or shorter by the unevenness, on each process by itself.
    """
    uneven_2N = unevenness * np.random.default_rng(seed).standard_normal((2, parts * layers))
    compute_2N = (1 + uneven_2N).clip(0) / parts
    turns, now_2, free_2, landed_2 = iter(compute_2N.T), np.zeros(2), np.zeros(2), {}
    for step, part, layer in steps_of(order, parts, layers):
        awaited = {"rows": ("counts", part, layer), "results": ("rows", part, layer)}
        # what the other process sent, if this is not the first layer
        sent_2 = landed_2.get(awaited.get(step, ("results", part, layer - 1)), np.zeros(2))
        now_2 = np.maximum(now_2, sent_2[::-1])
        if step == "results":
            now_2 = now_2 + next(turns)
        if step in ("rows", "results"):
            free_2 = np.maximum(now_2, free_2) + exchange / (2 * parts)
        landed_2[step, part, layer] = now_2 if step == "counts" else free_2
    return now_2.max() / max(compute_2N.sum(axis=1).max(), layers * exchange)


@pytest.mark.parametrize(("exchange", "halves", "four"), [(0.5, 1.25, 1.02), (1, 1.5, 1.03), (2, 1.0, 1.0)])
def test_four_parts_at_different_steps_reach_the_bound_and_halves_do_not(exchange, halves, four):
    assert over_bound(weave, 2, 8, exchange) == pytest.approx(halves, abs=0.005)
    assert over_bound(stagger, 4, 8, exchange) == pytest.approx(four, abs=0.005)
    assert over_bound(weave, 1, 8, exchange) == pytest.approx((1 + exchange) / max(1, exchange))
    assert over_bound(stagger, 1, 8, exchange) == over_bound(weave, 1, 8, exchange)


@pytest.mark.parametrize(("exchange", "four", "six"), [(0.5, 1.03, 1.02), (1, 1.11, 1.04), (2, 1.0, 1.0)])
def test_six_parts_make_up_for_uneven_computation(exchange, four, six):
    found = [[over_bound(stagger, parts, 8, exchange, 0.2, seed) for seed in range(10)] for parts in (4, 6)]
    assert np.mean(found, axis=1) == pytest.approx([four, six], abs=0.005)


def test_parts_of_other_lengths_and_none_at_all_are_taken_to_their_ends():
    def part(steps):
        yield from range(steps)
        return steps

    assert stagger([part(steps) for steps in (9, 0, 3, 15, 7)]) == [9, 0, 3, 15, 7]
    assert stagger([]) == weave([]) == []

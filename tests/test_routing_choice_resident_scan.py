"""Resident sets: a hand-computed sequence, the C against torch and against plain Python, calls of any length."""

import pytest
import torch

from routing.choice.resident_scan import resident_scan, resident_scan_reference


def by_hand(scores, valid, residents, rank, margin):
    """The rule in words: sets of ids after each token of one sequence."""
    held, sets = None, []
    for score, is_valid in zip(scores, valid, strict=True):
        if is_valid and held is None:
            held = set(sorted(range(len(score)), key=lambda e: (-score[e], e))[:residents])
        elif is_valid:
            outside = [e for e in range(len(score)) if e not in held]
            worst = max(held, key=lambda e: (-score[e], e))
            best = min(outside, key=lambda e: (-score[e], e), default=None)
            if best is not None and sum(score[best] <= score[e] + margin for e in held) < rank:
                held = (held - {worst}) | {best}
        sets.append(held or set())
    return sets


def ids(after_BSE):
    return [[set(row.nonzero()[:, 0].tolist()) for row in sequence] for sequence in after_BSE]


def test_one_sequence_by_hand():
    score_BSE = torch.tensor([[[5.0, 1, 4, 0], [0, 3, 2, 9], [1, 1, 1, 1], [7, 8, 0, 6], [7, 8, 0, 6]]])
    valid_BS = torch.tensor([[True, True, True, True, False]])
    # token 0 takes 0 and 2; token 1 swaps 0 for 3; ties swap nothing; token 3 swaps 2 for 1; padding changes nothing
    sets = [{0, 2}, {2, 3}, {2, 3}, {1, 3}, {1, 3}]
    assert ids(resident_scan(score_BSE, valid_BS, None, 2, rank=2)) == [sets]
    assert ids(resident_scan(score_BSE, valid_BS, None, 2, rank=2, margin=9.0)) == [[{0, 2}] * 5]
    # as one of the token's best: at token 3 expert 1 beats both residents, so nothing changes
    assert ids(resident_scan(score_BSE, valid_BS, None, 2, rank=1)) == [sets]
    # a newcomer that one of two residents is a match for enters by rank 2 only
    score_BSE = torch.tensor([[[5.0, 4, 0], [3, 1, 2]]])
    for rank, after in ((1, {0, 1}), (2, {0, 2})):
        assert ids(resident_scan(score_BSE, torch.ones(1, 2).bool(), None, 2, rank=rank)) == [[{0, 1}, after]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("levels", [4, 1000], ids=["many ties", "few ties"])
def test_every_way_gives_the_same_sets(dtype, levels):
    torch.manual_seed(3)
    sizes = [(1, 1, 1, 1, 1, 0.0), (3, 40, 7, 3, 3, 0.0), (2, 63, 16, 16, 2, 0.0), (2, 30, 9, 4, 2, 1.5)]
    for B, S, E, C, rank, margin in sizes:
        score_BSE = torch.randint(levels, (B, S, E)).to(dtype)
        valid_BS = torch.rand(B, S) < 0.8
        found = resident_scan(score_BSE, valid_BS, None, C, rank=rank, margin=margin)
        start_BE = torch.zeros(B, E, dtype=torch.uint8)
        assert torch.equal(found, resident_scan_reference(score_BSE, valid_BS, start_BE, C, rank=rank, margin=margin))
        assert ids(found) == [
            by_hand(s, v, C, rank, margin) for s, v in zip(score_BSE.tolist(), valid_BS.tolist(), strict=True)
        ]
        assert (found.sum(dim=-1) <= C).all()
        assert ((found[:, 1:] > found[:, :-1]).sum(dim=-1) <= torch.where(found[:, :-1].bool().any(dim=-1), 1, C)).all()


def test_calls_of_any_length_end_with_the_sets_of_one_call():
    score_BSE, valid_BS = torch.randn(2, 24, 8), torch.rand(2, 24) < 0.9
    whole = resident_scan(score_BSE, valid_BS, None, 3, rank=2)
    for lengths in ([1] * 24, [5, 19], [23, 1]):
        before, parts = None, []
        for score, valid in zip(score_BSE.split(lengths, 1), valid_BS.split(lengths, 1), strict=True):
            parts.append(resident_scan(score, valid, before, 3, rank=2))
            before = parts[-1][:, -1]
        assert torch.equal(torch.cat(parts, dim=1), whole)

"""Ternary weights in words of variable length: the dictionary, the code, and the C against its definition."""

import numpy as np
import pytest
import torch

from offload.codes import ternary
from offload.codes.ternary import dictionary, encode, expand, most_words, part_bytes
from offload.compute.orders import orders
from offload.formats.lossy.ternary import HEAD_BYTES
from offload.lowbit.methods.compensation import second_moment
from offload.lowbit.methods.ternary import ternary as rounded
from offload.native.kernel_matrix import plain_matrix


def signs(rows, columns, zero, seed=0):
    uniform_RC = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed))
    return (uniform_RC > (1 + zero) / 2).float() - ((uniform_RC > zero) & (uniform_RC <= (1 + zero) / 2)).float()


def spelt(entry):
    """The pairs of a run."""
    return tuple((entry >> 4 + 4 * pair & 3, entry >> 6 + 4 * pair & 3) for pair in range(entry & 15))


@pytest.mark.slow
@pytest.mark.parametrize("number", range(4))
def test_the_dictionary_has_the_most_probable_runs_and_all_their_beginnings(number):
    entries, zero = dictionary(number), ternary.ZERO_SHARES[number]
    runs = [spelt(entry) for entry in entries.tolist()]
    found = {(), *runs}
    assert len(found) == 1 + (1 << 16)
    assert all(run[:-1] in found for run in runs[::7])
    assert sum(len(run) == 1 for run in runs) == 9

    def probability(run):
        others = sum(weight > 0 for pair in run for weight in pair)
        return zero ** (2 * len(run) - others) * ((1 - zero) / 2) ** others

    least = min(map(probability, runs))
    for run in runs[::211]:
        for pair in ((0, 0), (0, 1), (2, 0), (1, 2)):
            longer = (*run, pair)
            assert longer in found or len(longer) > 14 or probability(longer) <= least * (1 + 1e-9)


@pytest.mark.parametrize(
    ("rows", "columns", "zero"), [(5, 64, 0.9), (33, 130, 0.7), (3, 7, 0.5), (2, 400, 1.0), (1, 1, 0.0)]
)
def test_what_is_written_is_read_by_both(rows, columns, zero):
    sign_RC = signs(rows, columns, zero)
    low_R, high_R = -torch.rand(rows).bfloat16(), torch.rand(rows).bfloat16()
    number, parts = encode(sign_RC, low_R, high_R)
    words = parts["words"].numel() // 2
    assert {role: part.numel() for role, part in parts.items()} == part_bytes(rows, words)
    assert words <= most_words(rows, columns)
    expected = torch.where(sign_RC > 0, high_R[:, None], torch.where(sign_RC < 0, low_R[:, None], 0.0)).bfloat16()
    assert torch.equal(ternary.decode(number, parts, rows, columns), expected)
    for is_transposed in (False, True):
        out = torch.empty((columns, rows) if is_transposed else (rows, columns), dtype=torch.bfloat16)
        expand(number, parts, out, is_transposed=is_transposed)
        assert torch.equal(out.t() if is_transposed else out, expected)


def test_every_run_is_expanded_as_it_is_spelt():
    number = 2
    words = np.arange(1 << 16, dtype=np.uint16)
    width = 2 * int((dictionary(number) & np.uint64(15)).sum())
    parts = {"low": torch.tensor([-2.0]), "high": torch.tensor([3.0])}
    parts = {role: value.bfloat16().view(torch.uint8) for role, value in parts.items()}
    parts["starts"] = torch.tensor([0, 1 << 16], dtype=torch.int32).view(torch.uint8)
    parts["words"] = torch.from_numpy(words.view(np.uint8))
    out = torch.empty(1, width, dtype=torch.bfloat16)
    expand(number, parts, out, is_transposed=False)
    assert torch.equal(out, ternary.decode(number, parts, 1, width))


def test_damaged_words_stay_within_the_matrix():
    number, parts = encode(signs(8, 96, 0.9), torch.full((8,), -1.0), torch.ones(8))
    chance = torch.Generator().manual_seed(3)
    for _ in range(30):
        damaged = {role: part.clone() for role, part in parts.items()}
        for role in ("starts", "words"):
            place = torch.randint(damaged[role].numel(), (3,), generator=chance)
            damaged[role][place] = torch.randint(256, (3,), generator=chance).to(torch.uint8)
        guarded = torch.full((8 * 96 + 64,), 7.0).bfloat16()
        expand(number, damaged, guarded[: 8 * 96].view(8, 96), is_transposed=False)
        assert bool((guarded[8 * 96 :] == 7).all())


def test_sparse_rows_take_less_than_a_bit():
    number, parts = encode(signs(64, 2048, 0.93), -torch.ones(64), torch.ones(64))
    bits = 8 * (HEAD_BYTES + sum(part.numel() for part in parts.values())) / (64 * 2048)
    assert number == 3
    assert 16 / 28 < bits < 0.8


def test_thresholds_are_half_of_the_extremes():
    w_RC = torch.tensor([[1.0, 0.6, 0.4, -0.2, -0.8, -0.5], [0.0, 0.0, 0.0, 0.0, 0.0, 0.0]])
    found = rounded(w_RC)
    assert found.sign_RC.tolist() == [[1, 1, 0, 0, -1, -1], [0, 0, 0, 0, 0, 0]]
    assert found.high_R.tolist() == [pytest.approx(0.8, rel=4e-3), 0]
    assert found.low_R.tolist() == [pytest.approx(-0.65, rel=4e-3), 0]


def test_spread_errors_lower_the_error_of_outputs():
    chance = torch.Generator().manual_seed(1)
    w_RC, mix_CC = torch.randn(48, 64, generator=chance), torch.randn(64, 64, generator=chance)
    x_NC = torch.randn(400, 64, generator=chance) @ mix_CC
    moment_CC = second_moment(x_NC, torch.ones(400))
    errors = [
        float((x_NC @ (found.weight_RC - w_RC).T).square().sum()) for found in (rounded(w_RC, moment_CC), rounded(w_RC))
    ]
    assert errors[0] < 0.7 * errors[1]


@pytest.mark.parametrize(("shape", "zero"), [((64, 256), 0.9), ((33, 77), 0.7), ((96, 320), 0.97)])
def test_products_have_the_bits_of_the_decoded_matrix(shape, zero):
    """Two matrices with other words in one call, in every order of summation."""
    chance, stored, plain, kept = torch.Generator().manual_seed(6), [], [], []
    for seed in (0, 1):
        low_R, high_R = -torch.rand(shape[0], generator=chance), torch.rand(shape[0], generator=chance)
        number, parts = encode(signs(*shape, zero, seed), low_R, high_R)
        kept.append(parts)
        assert ternary.has_whole_rows(parts)
        stored.append(ternary.kernel_matrix_of(number, parts, *shape))
        plain.append(ternary.decode(number, parts, *shape))
    for order in (order for order in orders() if order.fits(shape)):
        for rows in (1, 5, 20):
            x_nD = torch.randn(rows, shape[1], generator=chance).bfloat16()
            got, expected = ([torch.empty(rows, shape[0], dtype=torch.bfloat16) for _ in plain] for _ in range(2))
            order.multiply(x_nD, stored, got)
            order.multiply(x_nD, [plain_matrix(each) for each in plain], expected)
            assert all(map(torch.equal, got, expected))


def test_rows_that_do_not_follow_each_other_are_seen():
    _, parts = encode(signs(8, 96, 0.9), torch.full((8,), -1.0), torch.ones(8))
    start = parts["starts"].view(torch.int32)
    for place, value in ((0, 1), (3, int(start[4]) + 1), (8, int(start[8]) - 1), (2, -1)):
        damaged = start.clone()
        damaged[place] = value
        assert not ternary.has_whole_rows({**parts, "starts": damaged.view(torch.uint8)})

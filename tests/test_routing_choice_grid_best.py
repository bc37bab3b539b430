"""The best places of a grid: C against torch and against every place, the same sums for any number of threads."""

import ctypes
import platform
from pathlib import Path

import pytest
import torch

from routing import compile_library
from routing.choice import grid_best
from routing.choice.grid_best import best_of_grid, side_scores
from routing.choice.library import routing_kernels


@pytest.fixture(autouse=True)
def _needs_c():
    if routing_kernels() is None:
        pytest.skip("no C compiler, or no wide registers")


def given(n, r, M, k, seed=0, levels=None):
    """Parts, proxy, core and paired columns; with `levels`, small whole numbers, so that many scores are equal."""
    generator = torch.Generator().manual_seed(seed)

    def numbers(*shape):
        drawn = torch.randn(*shape, generator=generator)
        return drawn if levels is None else (drawn * levels).round()

    columns = [k if r > 1 else k // (row + 1) for row in range(k)]
    proxy, core = (numbers(2, r), numbers(r, r)) if r > 1 else (None, None)
    return numbers(2, r, n, M), proxy, core, columns


CASES = [(1, 1, 1, 1), (3, 1, 9, 5), (70, 1, 64, 16), (40, 2, 100, 32), (5, 3, 1000, 7)]


@pytest.mark.parametrize("sizes", CASES)
@pytest.mark.parametrize("levels", [None, 2])
def test_c_finds_what_torch_finds(sizes, levels):
    inputs = given(*sizes, levels=levels)
    is_valid_n = torch.rand(sizes[0], generator=torch.Generator().manual_seed(1)) < 0.7
    for valid in (None, is_valid_n):
        found, expected = grid_best._by_c(*inputs, valid), grid_best._by_torch(*inputs, valid)
        if levels is not None or inputs[1] is None:  # else last bits may decide between two places
            assert torch.equal(found.row_nK, expected.row_nK)
            assert torch.equal(found.column_nK, expected.column_nK)
        assert torch.equal(found.row_nK.sort(-1).values, expected.row_nK.sort(-1).values)
        torch.testing.assert_close(found.score_nK, expected.score_nK, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found.probability_2M, expected.probability_2M, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found.entropy, expected.entropy, atol=1e-4, rtol=1e-5)
        for side, place_nK in enumerate((found.row_nK, found.column_nK)):
            picked_rnK = inputs[0][side].gather(-1, place_nK.expand(sizes[1], -1, -1))
            assert torch.equal(found.part_2rnK[side], picked_rnK)


def test_the_best_of_all_places_are_found():
    inputs = given(50, 1, 30, 6)
    row_nM, column_nM = inputs[0][:, 0]
    best = (row_nM[:, :, None] + column_nM[:, None]).flatten(1).topk(6)
    found = best_of_grid(*inputs, None)
    assert torch.equal(found.row_nK * 30 + found.column_nK, best.indices)
    assert torch.equal(found.score_nK, best.values)


def test_any_number_of_threads_gives_the_same_bits(several_threads):
    inputs, found = given(200, 2, 64, 8), []
    for threads in (1, 2, 3):
        several_threads(threads)
        found.append(best_of_grid(*inputs, None))
    for other in found[1:]:
        assert all(torch.equal(value, getattr(other, name)) for name, value in vars(found[0]).items())


def test_numbers_that_are_none_are_never_chosen_before_others_and_sums_stay_within_the_float_range():
    part, *rest = given(4, 1, 40, 8)
    part[:, :, 1, 3:30] = torch.nan
    part[:, :, 2] *= 1e4
    found = best_of_grid(part, *rest, torch.tensor([True, False, True, True]))
    assert not part[0, 0, 1, found.row_nK[1]].isnan().any()
    expected_2nM = side_scores(part, None)[:, [0, 2, 3]].softmax(-1)
    torch.testing.assert_close(found.probability_2M, expected_2nM.sum(1))
    assert found.entropy.isfinite()


def test_other_dtypes_and_programs_that_are_traced_are_computed_by_torch():
    inputs = given(6, 2, 20, 4)
    double = [given.double() if torch.is_tensor(given) else given for given in inputs]
    found, expected = best_of_grid(*double, None), best_of_grid(*inputs, None)
    assert found.score_nK.dtype == torch.float64
    torch.testing.assert_close(found.score_nK.float(), expected.score_nK)


@pytest.mark.slow
@pytest.mark.parametrize("levels", [None, 2])
def test_processors_without_wide_registers_find_the_same_places(levels, monkeypatch):
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("flags of another kind of processor")
    sources = [Path(grid_best.__file__).with_name(f"{name}.c") for name in ("top_k", "grid_best")]
    plain = compile_library(sources, flags=["-mno-avx512f"])
    plain.expertier_grid_best.argtypes, plain.expertier_grid_block.restype = [ctypes.c_void_p], ctypes.c_int64
    inputs = [given(*sizes, levels=levels) for sizes in CASES]
    expected = [best_of_grid(*each, None) for each in inputs]
    monkeypatch.setattr(grid_best, "routing_kernels", lambda: plain)
    for each, wide in zip(inputs, expected, strict=True):
        found = best_of_grid(*each, None)
        assert torch.equal(found.row_nK.sort(-1).values, wide.row_nK.sort(-1).values)
        torch.testing.assert_close(found.score_nK, wide.score_nK, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found.probability_2M, wide.probability_2M, atol=1e-5, rtol=1e-5)

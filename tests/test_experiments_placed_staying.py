"""Tokens that stay where their experts are: a layer by hand, and where they come home by trying every way."""

from itertools import product

import numpy as np
import pytest

from experiments.placed.staying import RowBytes, Turns, crossed, homecomings, passed

G = 3
# expert 0 on process 0, expert 1 on process 1, experts 2 and 3 on process 2
TABLE = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 1]])
TURNS = Turns.of([TABLE] * G)


def test_a_layer_by_hand():
    experts = np.array([[0, 1], [2, 3], [1, 2], [-1, -1]], np.int16)
    at = np.zeros(4, np.int64)
    found, after = crossed(TURNS, experts, at, None)
    # token 0 has an expert at home and stays; 1 goes on where both of its are; 2 at the first of two; 3 has none
    assert after.tolist() == [0, 2, 1, 0]
    assert found.moves == 2
    assert found.there_GG.tolist() == [[1, 2, 2], [0, 0, 0], [0, 0, 0]]
    # sums: of token 0 from 0 and 1 to 0, of token 1 from 2 to 2, of token 2 from 1 and 2 to 1
    assert found.on_GG.tolist() == [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
    assert found.rows == 6
    assert found.nbytes(RowBytes(there=10, on=1, context=0)) == 42
    # and home again, from where they are now: token 1 at process 2 has experts there only, so its state goes alone
    home, after = crossed(TURNS, experts, np.array([0, 2, 1, 0]), at)
    assert after.tolist() == [0, 0, 0, 0]
    assert home.there_GG.tolist() == [[1, 1, 0], [1, 1, 1], [1, 0, 1]]
    assert home.on_GG.tolist() == [[1, 0, 0], [2, 0, 0], [2, 0, 0]]


def test_copies_take_turns_by_the_places_of_the_tokens_that_are_there():
    table = np.array([[1, 1]])
    turns = Turns.of([table, table])
    experts = np.zeros((4, 1), np.int16)
    # tokens 0 and 2 are on process 0, 1 and 3 on process 1: the first of each asks copy 0, the second copy 1
    _, after = crossed(turns, experts, np.array([0, 1, 0, 1]), None)
    assert after.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("context", [0, 3, 12, 60])
def test_no_other_way_home_moves_fewer_bytes(context):
    random = np.random.default_rng(context)
    L, T = 5, 40
    expert_TLK = random.integers(-1, 4, (T, L, 2)).astype(np.int16)
    home_T, row = np.arange(T) % G, RowBytes(there=20, on=16, context=context)

    def moved(is_home_L):
        layers, away = passed([TURNS] * L, expert_TLK, home_T, is_home_L)
        return sum(layer.nbytes(row) for layer in layers) + away * (G - 1) * context

    found = homecomings([TURNS] * L, expert_TLK, home_T, row)
    every = [moved([*ways, True]) for ways in product((False, True), repeat=L - 1)]
    assert found[-1]
    assert moved(found) == min(every)
    assert min(every) < max(every)
    if context == 60:
        assert all(found)

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement.heuristics.eplb import eplb
from placement.heuristics.eplb_reference import eplb_layer_reference


def test_eplb_gives_the_published_example():
    weight = np.array(
        [[90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86], [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27]],
        float,
    )
    published = [
        [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
        [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
    ]
    assert eplb(weight, slots=16, groups=4, nodes=2, gpus=8).tolist() == published


SHAPES = [(16, 16, 4, 1, 4), (16, 24, 4, 2, 8), (24, 32, 3, 2, 8), (12, 12, 1, 1, 12), (8, 8, 8, 4, 4), (6, 9, 2, 1, 3)]


@settings(max_examples=60, deadline=None)
@given(shape=st.sampled_from(SHAPES), seed=st.integers(0, 999), is_integer=st.booleans())
def test_eplb_equals_its_reference(shape, seed, is_integer):
    experts, slots, groups, nodes, gpus = shape
    weight = np.random.default_rng(seed).exponential(100, (3, experts))
    weight = np.floor(weight / 10) if is_integer else weight
    expected = [eplb_layer_reference(row, slots, groups, nodes, gpus) for row in weight.tolist()]
    assert eplb(weight, slots, groups, nodes, gpus).tolist() == expected


def test_eplb_refuses_shapes_that_it_cannot_divide():
    with pytest.raises(ValueError, match="slots % gpus == 0"):
        eplb(np.ones((1, 6)), slots=7, groups=1, nodes=1, gpus=3)

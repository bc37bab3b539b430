"""A KV cache that grows in place: transformers' numbers, and nothing that was handed out is overwritten."""

import copy
import pickle

import pytest
import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

from offload.compute import kv_cache
from offload.compute.kv_cache import GrowingLayer, GrowingWindow, grow_in_place, room_positions

KINDS = {"full": DynamicLayer, "window": lambda: DynamicSlidingWindowLayer(10)}
PIECES = [5, 1, 1, 1, 7, *[1] * 150, 40, 1, 1]


class Caches:
    """The same tokens in a cache of transformers and in one of ours."""

    def __init__(self, kind):
        self.layers = [KINDS[kind](), KINDS[kind]()]
        self.generator = torch.Generator().manual_seed(0)
        grow_in_place(self._of(self.layers[1]))

    @staticmethod
    def _of(layer):
        cache = DynamicCache()
        cache.layers = [layer]
        return cache

    def update(self, length, batch=2):
        keys, values = (torch.randn(batch, 3, length, width, generator=self.generator).bfloat16() for width in (8, 4))
        expected, found = (layer.update(keys, values) for layer in self.layers)
        for theirs, ours in zip(expected, found, strict=True):
            assert torch.equal(theirs, ours)
        self.check()
        return found

    def check(self):
        theirs, ours = self.layers
        assert torch.equal(theirs.keys, ours.keys)
        assert torch.equal(theirs.values, ours.values)
        assert theirs.get_seq_length() == ours.get_seq_length()
        assert theirs.get_mask_sizes(1) == ours.get_mask_sizes(1)


@pytest.mark.parametrize("kind", KINDS)
def test_all_that_is_returned_and_held_is_what_transformers_has(kind):
    caches = Caches(kind)
    for length in PIECES:
        caches.update(length)
    assert type(caches.layers[1]) is {"full": GrowingLayer, "window": GrowingWindow}[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_appended_in_place(kind):
    caches = Caches(kind)
    caches.update(5)
    caches.update(1)
    before = caches.layers[1].keys.untyped_storage().data_ptr()
    for _ in range(20):
        caches.update(1)
    assert caches.layers[1].keys.untyped_storage().data_ptr() == before


def test_views_that_were_handed_out_keep_their_numbers():
    caches, seen = Caches("full"), []
    for length in PIECES:
        found = caches.update(length)
        seen.append((found, [states.clone() for states in found]))
    for found, copies in seen:
        assert all(map(torch.equal, found, copies))


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.crop(-2),
        lambda layer: layer.reorder_cache(torch.tensor([1, 0])),
        lambda layer: layer.batch_select_indices(torch.tensor([1, 1])),
        lambda layer: layer.reset(),
        lambda layer: setattr(layer, "keys", layer.keys * 2),
    ],
    ids=["crop", "reorder", "select", "reset", "assign"],
)
def test_a_layer_that_was_changed_by_others_goes_on_from_what_it_holds(change):
    caches = Caches("full")
    for length in (5, 1, 1):
        caches.update(length)
    old = caches.layers[1].keys
    numbers = old.clone()
    for layer in caches.layers:
        change(layer)
    for length in (1, 1, 3, 1):
        caches.update(length)
    assert torch.equal(old, numbers)


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
@pytest.mark.parametrize("kind", KINDS)
def test_copies_go_their_own_ways(duplicate, kind):
    caches = Caches(kind)
    for length in (5, 1, 1):
        caches.update(length)
    other = duplicate(caches.layers[1])
    expected = torch.cat([other.keys, torch.ones(2, 3, 1, 8).bfloat16()], dim=-2)
    found, _ = other.update(torch.ones(2, 3, 1, 8).bfloat16(), torch.ones(2, 3, 1, 4).bfloat16())
    caches.update(1)
    caches.update(1)
    assert torch.equal(found, expected)


def test_an_exception_between_any_two_writes_leaves_a_cache_that_can_go_on(monkeypatch):
    caches = Caches("full")
    for length in (5, 1, 1):
        caches.update(length)
    ours, keys, values = caches.layers[1], caches.layers[1].keys, caches.layers[1].values
    keep = kv_cache._Room.keep

    def interrupted(room, held):
        keep(room, held)
        raise KeyboardInterrupt

    monkeypatch.setattr(kv_cache._Room, "keep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ours.update(torch.ones(2, 3, 1, 8).bfloat16(), torch.ones(2, 3, 1, 4).bfloat16())
    monkeypatch.undo()
    assert ours.keys is keys
    assert ours.values is values
    for length in (1, 2, 1):
        caches.update(length)


def test_rooms_made_in_inference_mode_are_written_to_outside():
    caches = Caches("full")
    with torch.inference_mode():
        for length in (5, 1, 1):
            caches.update(length)
    with torch.no_grad():
        for length in (1, 1, 1):
            caches.update(length)


def test_gradients_go_through_transformers_own_update():
    layer = DynamicLayer()
    cache = Caches._of(layer)
    grow_in_place(cache)
    states = [torch.randn(1, 1, 2, 4, requires_grad=True) for _ in range(3)]
    for state in states:
        keys, _ = layer.update(state, state)
    keys.sum().backward()
    assert all(torch.equal(state.grad, torch.ones_like(state)) for state in states)


def test_other_layers_and_no_cache_stay_as_they_are():
    grow_in_place(None)
    cache = Caches._of(StaticLayer(8))
    grow_in_place(cache)
    assert type(cache.layers[0]) is StaticLayer


def test_large_rooms_lie_in_a_mapping_and_small_steps_make_them_larger():
    layer = DynamicLayer()
    grow_in_place(Caches._of(layer))
    expected = torch.zeros(1, 2, 0, 512).bfloat16()
    for length in (2000, 1, 1, 300, 1):
        new = torch.randn(1, 2, length, 512).bfloat16()
        expected = torch.cat([expected, new], dim=-2)
        keys, _ = layer.update(new, new)
        assert torch.equal(keys, expected)


@pytest.mark.parametrize(("positions", "expected"), [(1, 96), (32, 96), (33, 128), (1024, 1088), (2048, 2176)])
def test_positions_of_a_room(positions, expected):
    assert room_positions(positions) == expected

"""The structs and functions of `native/layers`."""

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import torch

from ...formats.resident.stored_weight import kernel_matrix
from ...native.library import NUMBER, POINTER, c_function
from ..norms import TokenNorm
from ..orders import ExpertWeights, GatingTables, Order, part_addresses, pointers


class Norm(ctypes.Structure):
    """`struct norm`; without a weight there is none."""

    _fields_ = (("weight", POINTER), ("width", NUMBER), ("epsilon", ctypes.c_float), ("rounds_first", ctypes.c_int))


class Siblings(ctypes.Structure):
    """`struct siblings`: matrices that are multiplied with the same row."""

    _fields_ = (
        *(("order", ctypes.c_int), ("form", ctypes.c_int)),
        *(("block", NUMBER), ("num", NUMBER), ("columns", NUMBER)),
        *(("part", POINTER), ("parameter", POINTER), ("bias", POINTER), ("rows", POINTER)),
    )


class Choice(ctypes.Structure):
    """`struct choice`: how a router chooses experts for one token; nothing is chosen if `chosen` is 0."""

    _fields_ = (
        *((name, NUMBER) for name in ("experts", "chosen", "groups", "kept_groups", "best_of_group")),
        ("bias", POINTER),
        *((name, ctypes.c_float) for name in ("masked", "added", "least", "scale")),
        *((name, ctypes.c_int) for name in ("rule", "normalises", "is_rounded", "lanes")),
        *((name, ctypes.c_int) for name in ("is_wide", "is_bias_wide", "is_sorted", "is_unbiased")),
    )


class Router(ctypes.Structure):
    """`struct router`; without matrices, logits come from elsewhere."""

    _fields_ = (("product", Siblings), ("wide", POINTER), ("width", NUMBER), ("choice", Choice))


class EndingTerms(ctypes.Structure):
    """`struct ending`."""

    _fields_ = (
        *(("scale", ctypes.c_float), ("has_shared", ctypes.c_int), ("order", ctypes.c_int)),
        *(("up_block", NUMBER), ("down_block", NUMBER)),
        *(("shared", ExpertWeights), ("gating", GatingTables), ("gate", Siblings), ("gate_logit", POINTER)),
    )


class Heads(ctypes.Structure):
    """`struct heads`."""

    _fields_ = (("heads", NUMBER), ("shared_heads", NUMBER), ("width", NUMBER), ("scale", ctypes.c_float))


class Layer(ctypes.Structure):
    """`struct decoder_layer`."""

    _fields_ = (
        *(("width", NUMBER), ("rotated", NUMBER), ("heads", Heads)),
        *(("before", Norm), ("query", Norm), ("key", Norm), ("after", Norm)),
        *(("inputs", Siblings), ("output", Siblings), ("router", Router)),
    )


class Place(ctypes.Structure):
    """`struct place`, where the keys or values of a new token go; and `struct cached`, where all of them begin."""

    _fields_ = (("first", POINTER), ("stride", NUMBER))


def norm_struct(norm: TokenNorm | None) -> Norm:
    """A norm as C takes it."""
    if norm is None:
        return Norm()
    weight = norm.module.weight
    return Norm(weight.data_ptr(), weight.shape[0], norm.epsilon, norm.rounds_first)


def siblings_struct(
    order: Order, weights_FD: Sequence[torch.Tensor], biases_F: Sequence[torch.Tensor | None]
) -> Siblings:
    """Matrices of one form and width as C takes them; the struct keeps what its addresses point to.

    Args:
        order: in which products are added.
        weights_FD: that our C multiplies from where they are stored.
        biases_F: one for each, or None.
    """
    matrices = [matrix for weight in weights_FD if (matrix := kernel_matrix(weight)) is not None]
    assert len(matrices) == len(weights_FD)
    first = matrices[0]
    parts = part_addresses(matrices)
    bias = pointers([0 if each is None else each.data_ptr() for each in biases_F])
    rows = (NUMBER * len(matrices))(*[matrix.rows for matrix in matrices])
    parameter = None if first.parameter is None else ctypes.addressof(first.parameter)
    found = Siblings(
        *(order.number, first.form, order.block, len(matrices), first.columns),
        *(ctypes.addressof(parts), parameter, ctypes.addressof(bias), ctypes.addressof(rows)),
    )
    found.keeps = (matrices, parts, bias, rows)
    return found


@functools.cache
def begin_attention() -> Any:
    """`expertier_begin_attention`; None without a C compiler, as all of these."""
    place = ctypes.POINTER(Place)
    types = (ctypes.POINTER(Layer), POINTER, POINTER, POINTER, NUMBER, POINTER, place, place)
    return c_function("expertier_begin_attention", *types)


@functools.cache
def end_attention() -> Any:
    """`expertier_end_attention`."""
    return c_function("expertier_end_attention", ctypes.POINTER(Layer), *([POINTER] * 7), result=ctypes.c_int)


@functools.cache
def whole_attention() -> Any:
    """`expertier_attention`."""
    place = ctypes.POINTER(Place)
    types = (ctypes.POINTER(Layer), *([POINTER] * 3), NUMBER, place, place, NUMBER, *([POINTER] * 7))
    return c_function("expertier_attention", *types, result=ctypes.c_int)


@functools.cache
def attend() -> Any:
    """`expertier_attend`."""
    place = ctypes.POINTER(Place)
    types = (ctypes.POINTER(Heads), NUMBER, POINTER, place, place, POINTER)
    return c_function("expertier_attend", *types, result=ctypes.c_int)


@functools.cache
def choose_experts() -> Any:
    """`expertier_choose`."""
    return c_function("expertier_choose", ctypes.POINTER(Choice), POINTER, POINTER, POINTER, result=ctypes.c_int)


@functools.cache
def route() -> Any:
    """`expertier_route`."""
    return c_function("expertier_route", ctypes.POINTER(Router), *([POINTER] * 4), result=ctypes.c_int)


@functools.cache
def end_block() -> Any:
    """`expertier_end_block`."""
    return c_function("expertier_end_block", ctypes.POINTER(EndingTerms), POINTER, NUMBER, POINTER, POINTER)

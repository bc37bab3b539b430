"""Arguments that kernels share: their order agrees in every signature, every positional call and every launch.

Kernels take some twenty arguments one by one (weights, activation, arithmetic). Functions inside kernels are called by
position, where two arguments that trade places change a result and raise nothing.
"""

import ast
import itertools
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from moe.kernels.grouped.metadata import Groups, TileMap, _tile_map_arguments
from moe.kernels.launching.launch import arithmetic
from moe.kernels.launching.tiles import Tile, uniform_tiles
from moe.kernels.tuning.planned import decode_launches, layer_launches, meta_weights
from moe.kernels.weights.activation import Activation
from moe.kernels.weights.weight_tile import Projection, weight_arguments

FOLDER = Path(__file__).parent.parent / "moe" / "kernels"
SOURCES = "\n\n".join(file.read_text(encoding="utf-8") for file in sorted(FOLDER.rglob("*.py")))

META = torch.empty(2, 4, 4, device="meta")
ONE = torch.empty(1, device="meta", dtype=torch.int32)
# arguments that one function on the host makes together; a kernel takes all of them, or those named here alone
GROUPS = {
    "weights": (list(weight_arguments(META, 4)), ({"BLOCK_IN"},)),
    "activation": (list(Activation().arguments()), ()),
    "arithmetic": (list(arithmetic(torch.float32)), ({"ACCUMULATE"},)),
    "tile map": (list(_tile_map_arguments(Groups(ONE, ONE, ONE, ONE), TileMap(ONE, ONE, 16))), "any"),
}


# what one kernel writes, among its last pointers, and another reads, among its first
HANDED_ON = {"activated_ptr", "grad_pre_ptr", "grad_ptr", "y_ptr"}


def jitted(source):
    """Parameters of every function that Triton compiles, by name."""
    functions = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and any(ast.unparse(mark) == "triton.jit" for mark in node.decorator_list):
            functions[node.name] = node
    return functions


def parameters(function):
    return [argument.arg for argument in function.args.args]


def order_conflicts(source):
    """Pairs of compiled functions whose common parameters come in different orders."""
    lists = {name: parameters(function) for name, function in jitted(source).items()}
    for (one, first), (other, second) in itertools.combinations(lists.items(), 2):
        in_first = [name for name in first if name in second and name not in HANDED_ON]
        in_second = [name for name in second if name in first and name not in HANDED_ON]
        if in_first != in_second:
            yield one, other, in_first, in_second


def misplaced(source):
    """Names passed by position that the callee has at another position; calls with too many or too few arguments."""
    functions = jitted(source)
    callees = {name: parameters(function) for name, function in functions.items()}
    callees["Projection"] = list(Projection._fields)
    for name, function in functions.items():
        for call in ast.walk(function):
            if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.func.id not in callees:
                continue
            wanted = callees[call.func.id]
            if call.keywords or len(call.args) != len(wanted):
                yield name, call.func.id, f"{len(call.args)} arguments for {len(wanted)} parameters"
                continue
            for place, argument in enumerate(call.args):
                given = ast.unparse(argument)
                own = given.removeprefix("weight_") if call.func.id == "Projection" and "stride" in given else given
                if own in wanted and wanted[place] != own:
                    yield name, call.func.id, f"{given} is passed as {wanted[place]}"


def test_parameters_that_functions_share_come_in_one_order():
    assert not list(order_conflicts(SOURCES))


def test_names_passed_by_position_are_where_the_callee_has_them():
    assert not list(misplaced(SOURCES))


@pytest.mark.parametrize("group", GROUPS)
def test_kernels_take_what_is_made_together_whole_and_in_its_order(group):
    names, alone = GROUPS[group]
    users = 0
    for kernel, function in jitted(SOURCES).items():
        found = [name for name in parameters(function) if name in names]
        if not kernel.endswith("_kernel") or not found:
            continue
        users += set(found) == set(names)
        if alone != "any" and set(found) not in alone:
            assert set(found) == set(names), kernel
        if group != "tile map":
            pointers = [name for name in found if name.endswith("_ptr")]
            assert pointers == [name for name in names if name in pointers], kernel
            for kind in (str.isupper, str.islower):
                own = [name for name in found if kind(name) and not name.startswith(("BLOCK", "EVEN"))]
                assert own == [name for name in names if name in own], kernel
    assert users >= 2


def launches():
    """Of layers and of decode steps, with whole and split sums."""
    tiles = uniform_tiles(Tile(16, 32, 32, 4, 2))
    for options in ({}, {"has_bias": True}, {"quantised": "int4"}, {"activation": Activation("relu2", gated=False)}):
        weights = meta_weights(1024, 128, 4, torch.bfloat16, **options)
        yield from layer_launches(weights, 64, 2, torch.bfloat16, tiles, trains=True)
        yield from decode_launches(weights, 1, 2, torch.bfloat16)
        yield from decode_launches(weights, 1, 2, torch.bfloat16, processors=64)


def test_every_launch_gives_every_parameter_and_no_other():
    functions, seen = jitted(SOURCES), set()
    for launch in launches():
        seen.add(name := launch.kernel.__name__)
        assert set(launch.arguments) == set(parameters(functions[name])), name
    assert seen == {name for name in functions if name.endswith("_kernel")}


RIGHT = """
@triton.jit
def inner(a, b, BLOCK: tl.constexpr):
    return a + b

@triton.jit
def outer_kernel(x, a, b, BLOCK: tl.constexpr):
    inner(a, b, BLOCK)
    Projection(weight_ptr, scale_ptr, zero_ptr, weight_stride_slot, weight_stride_out, weight_stride_in,
               scale_stride_slot, scale_stride_out, scale_stride_in, FORMAT, OUT_GROUP, IN_GROUP)
"""


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("inner(a, b, BLOCK)", "inner(b, a, BLOCK)"),
        ("inner(a, b, BLOCK)", "inner(a, b)"),
        ("weight_stride_out, weight_stride_in", "weight_stride_in, weight_stride_out"),
        ("OUT_GROUP, IN_GROUP", "IN_GROUP, OUT_GROUP"),
        ("outer_kernel(x, a, b,", "outer_kernel(x, b, a,"),
    ],
)
def test_the_checks_see_one_swapped_pair(right, wrong):
    assert not list(misplaced(RIGHT))
    assert not list(order_conflicts(RIGHT))
    broken = RIGHT.replace(right, wrong)
    assert broken != RIGHT
    assert list(misplaced(broken)) + list(order_conflicts(broken))

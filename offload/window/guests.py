"""Which weights outside experts can be streamed, and where the checkpoint has them.

A guest is a decoder layer, the head or an embedding. To the store it is a layer with one expert: its matrices. So the
reading threads, the stored forms and both ways past or through the page cache are those of experts. An embedding is a
layer with V experts, its rows, because a token reads one of them; so is any other table that token ids look up.
"""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from moe import Linear
from routing.ground.model_config import text_config

from ..checkpoint.experts import ExpertLayer, Parameter, Source
from ..checkpoint.tensors import TORCH_DTYPES, TensorEntry
from ..formats.plain import PlainForm

Matches = Mapping[str, Sequence[tuple[str, str | None]]]
SMALL_SHARE = 1 / 256
"""Weights below this share of their guest stay in memory: norms, biases, routers. They are read in no time and save no
memory, and the next layer's router is asked before its layer is there. A layer has a dozen of them; not tuned."""
ROWS = 64
"""Rows of an embedding that memory has room for, at the least: enough for the reading threads, and about 1 MiB.
Tables of no more rows stay: the memory that they would be read into is no smaller, and some are used without being
asked."""
HEADS = (nn.Linear, Linear)
WRITES_WEIGHTS = "layers_are_rescaled"
"""Of modules of transformers that divide weights in their forward pass (rwkv): what is read anew would lack it."""


class GuestForm(PlainForm):
    """The matrices of a guest.

    Those in float32 each begin at a block: on some processors the last bits of torch's products follow addresses.
    """

    @cached_property
    def _groups(self) -> tuple[tuple[Parameter, ...], ...]:
        if any(parameter.dtype == torch.float32 for parameter in self.parameters):
            return tuple((parameter,) for parameter in self.parameters)
        return super()._groups

    @cached_property
    def is_shiftable(self) -> bool:
        is_wide = any(parameter.dtype == torch.float32 for parameter in self.parameters)
        return not is_wide and self.is_straight and len(self.extents(0)) == len(self.regions)


@dataclass(frozen=True, eq=False)
class Guest:
    """Weights that come and go together.

    Args:
        name: of their module.
        form: where they lie; parameters are named as in the module.
        aliases: full names of all parameters that they are, of tied ones both.
        is_by_token: whether they are a table with a row for each token id.
    """

    name: str
    form: PlainForm
    aliases: frozenset[str]
    is_by_token: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return self.form.expert_bytes * self.form.layer.num_experts


@dataclass(frozen=True, kw_only=True, eq=False)
class Guests:
    """What can be streamed of a model, in order of use.

    Args:
        embeddings: tables whose rows can be read one by one, outside layers or in modules that look rows up.
        layers: decoder layers, without their experts.
        head: the matrix that gives logits; None if it cannot be streamed, or is none.
        is_tied: whether the head is the first embedding's matrix.
    """

    embeddings: tuple[Guest, ...] = ()
    layers: tuple[Guest, ...] = ()
    head: Guest | None = None
    is_tied: bool = False

    @property
    def passing(self) -> tuple[Guest, ...]:
        """Those that a pass uses whole: the layers and the head."""
        return self.layers if self.head is None else (*self.layers, self.head)

    @property
    def nbytes(self) -> int:
        """Bytes of all, a tied matrix once."""
        tables = self.embeddings[1:] if self.is_tied else self.embeddings
        return sum(guest.nbytes for guest in (*tables, *self.passing))


def find_guests(
    model: Any, entries: Mapping[str, TensorEntry], found: Matches, elsewhere: frozenset[str] = frozenset()
) -> Guests:
    """What can be streamed of a model.

    Weights that two layers share stay in memory, and so do those that the checkpoint stores as codes or in pieces.

    Args:
        model: on the meta device, in the dtype it will run in, without its experts' weights.
        entries: the checkpoint's tensors.
        found: what `match_checkpoint` says of the two.
        elsewhere: full names of parameters that come from another file, such as a bundle of hidden units.

    Returns:
        Nothing for a model that writes to its weights while it computes.
    """
    if any(hasattr(module, WRITES_WEIGHTS) for module in model.modules()):
        return Guests()
    owners: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), set()).add(name)
    looked_up = {name: module for name, module in model.named_modules() if is_row_reader(module)}
    tables_inside = frozenset(id(module.table) for module in looked_up.values())
    locate = _Locator(entries, found, owners, tables_inside, elsewhere)
    layers = {name: module for name, module in model.named_modules() if _is_layer(module)}
    inner = tuple(f"{name}." for name in layers)
    guests = [locate.layer(name, module) for name, module in layers.items() if not name.startswith(inner)]
    output, head = model.get_output_embeddings(), None
    named = {id(module): name for name, module in model.named_modules()}
    if type(output) in HEADS and id(output) in named:
        head = locate.whole(named[id(output)], output)
    tables = {
        name: module
        for name, module in model.named_modules()
        if _looks_up(module, model) and not name.startswith(inner)
    }
    is_tied = head is not None and any(id(table.weight) == id(output.weight) for table in tables.values())
    counts = _vocabulary_sizes(model.config)
    rows = [
        locate.rows(
            *(name, table, "weight"),
            is_by_token=table.num_embeddings in counts or table is model.get_input_embeddings(),
        )
        for name, table in tables.items()
        if table.max_norm is None
    ]
    rows += [locate.rows(name, module, "table") for name, module in looked_up.items()]
    embeddings = [guest for guest in rows if guest is not None]
    if head is not None:
        embeddings.sort(key=lambda guest: not guest.aliases & head.aliases)
        if is_tied and not (embeddings and embeddings[0].aliases & head.aliases):
            head, is_tied = None, False
    return Guests(
        embeddings=tuple(embeddings),
        layers=tuple(guest for guest in guests if guest is not None),
        head=head,
        is_tied=is_tied,
    )


def _vocabulary_sizes(config: Any) -> frozenset[int]:
    """Rows of tables with a row for each token id: models with several such tables may pad each in its own way.

    A table of something else with as many rows would cost reads, and no bit.
    """
    found = text_config(config).to_dict()
    return frozenset(count for name, count in found.items() if name.startswith("vocab_size") and isinstance(count, int))


def _is_layer(module: nn.Module) -> bool:
    """transformers derives every decoder layer from the class that may recompute it in training."""
    return isinstance(module, GradientCheckpointingLayer)


def _looks_up(module: nn.Module, model: Any) -> bool:
    """Whether a module is a table whose rows its own input names: others (learned positions) compute their rows."""
    if not isinstance(module, nn.Embedding):
        return False
    return type(module) is nn.Embedding or module is model.get_input_embeddings() or _scales_rows(module)


def _scales_rows(module: nn.Embedding) -> bool:
    """Whether a kind of embedding computes the same of a table's rows that are asked for as of the table; it is tried.

    So do per-layer embeddings, which scale what they look up.
    """
    probe = deepcopy(module)
    table_VD, row_N = torch.randn(8, module.embedding_dim), torch.tensor([2, 3, 7])
    probe.padding_idx = None  # type: ignore[assignment]
    for name, buffer in module.named_buffers(recurse=False):
        setattr(probe, name, torch.ones_like(buffer, device="cpu"))
    try:
        with torch.no_grad():
            probe.weight = nn.Parameter(table_VD)
            whole_ND = probe(row_N[None])
            probe.weight = nn.Parameter(table_VD[row_N])
            return torch.equal(probe(torch.arange(3)[None]), whole_ND)
    except Exception:  # it takes other inputs, or rows that are not there: so it is no plain look-up
        return False


def is_row_reader(module: Any) -> bool:
    """Whether a module looks rows of its parameter `table` up by `look_up`, as n-gram memories do.

    Before the first layer computes, it hands the numbers of these rows to its method `expect_rows`.
    """
    has_methods = all(callable(getattr(module, name, None)) for name in ("look_up", "expect_rows"))
    return has_methods and isinstance(getattr(module, "table", None), nn.Parameter)


@dataclass(frozen=True, eq=False)
class _Locator:
    """Finds the weights of modules in the checkpoint."""

    entries: Mapping[str, TensorEntry]
    found: Matches
    owners: Mapping[int, set[str]]
    looked_up: frozenset[int]
    """Tables within layers that are read by their rows."""
    elsewhere: frozenset[str]

    def layer(self, name: str, module: nn.Module) -> Guest | None:
        """A decoder layer's matrices that belong to it alone; None if it has none that can be streamed."""
        own = {
            inside: parameter
            for inside, parameter in module.named_parameters()
            if parameter.dim() > 1
            and len(self.owners[id(parameter)]) == 1
            and id(parameter) not in self.looked_up
            and f"{name}.{inside}" not in self.elsewhere
            and self._stored(parameter)
        }
        least = SMALL_SHARE * sum(parameter.nbytes for parameter in own.values())
        return self._guest(name, {inside: weight for inside, weight in own.items() if weight.nbytes >= least})

    def whole(self, name: str, module: nn.Module) -> Guest | None:
        """A module's weight, wherever else it is used."""
        weight: torch.Tensor = module.weight  # type: ignore[assignment]
        if self._stored(weight) is None:
            return None
        return self._guest(name, {"weight": weight})

    def rows(self, name: str, module: nn.Module, attribute: str, *, is_by_token: bool = False) -> Guest | None:
        """A module's table by its rows; None if it is small or must be changed while it is read."""
        table_VD: torch.Tensor = getattr(module, attribute)
        stored = self._stored(table_VD)
        if stored is None or len(table_VD) <= ROWS or stored.torch_dtype() != table_VD.dtype:
            return None
        count, width = table_VD.shape
        source = Source(stored.name, (stored,) * count, is_fused=True)
        row = Parameter(
            attribute, f"{name}.{attribute}", (width,), table_VD.dtype, (source,), None, ((0, 0, 0, width),)
        )
        form = PlainForm(ExpertLayer(name, count, (row,)))
        return Guest(name, form, frozenset(self.owners[id(table_VD)]), is_by_token)

    def _guest(self, name: str, own: Mapping[str, torch.Tensor]) -> Guest | None:
        if not own:
            return None
        parameters = tuple(self._parameter(name, *each) for each in own.items())
        aliases = frozenset(full_name for weight in own.values() for full_name in self.owners[id(weight)])
        return Guest(name, GuestForm(ExpertLayer(name, 1, parameters)), aliases)

    def _parameter(self, module_name: str, name: str, parameter: torch.Tensor) -> Parameter:
        full_name = f"{module_name}.{name}"
        stored = self._stored(parameter)
        assert stored is not None
        source, shape = Source(stored.name, (stored,), is_fused=False), tuple(parameter.shape)
        is_same = stored.torch_dtype() == parameter.dtype
        runs = ((0, 0, 0, prod(shape)),) if is_same else None
        return Parameter(name, full_name, shape, parameter.dtype, (source,), None, runs)

    def _stored(self, parameter: torch.Tensor) -> TensorEntry | None:
        """The one plain tensor that a parameter is; None if it is made of several, or of codes."""
        names = sorted(self.owners[id(parameter)])
        return plain_entry(names, tuple(parameter.shape), self.entries, self.found)


def plain_entry(
    names: Sequence[str], shape: tuple[int, ...], entries: Mapping[str, TensorEntry], found: Matches
) -> TensorEntry | None:
    """The one plain tensor that a parameter is; None if it is made of several, or of codes.

    Args:
        names: all full names of the parameter.
        shape: of the parameter, which its tensor must have as well.
        entries: the checkpoint's tensors.
        found: what `match_checkpoint` says of them.
    """
    keys = [key for name in names for key in found.get(name, ())]
    plain = [entries[key] for key, pattern in keys if pattern is None]
    if not plain or len(plain) < len(keys):
        return None
    is_plain = type(plain[0]) is TensorEntry and plain[0].dtype in TORCH_DTYPES
    return plain[0] if is_plain and plain[0].shape == shape else None

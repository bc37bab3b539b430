"""A checkpoint opened: the model without its experts, and how each layer's experts are stored."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from routing.ground.model_config import experts_per_token

from ..checkpoint.experts import experts_modules
from ..checkpoint.gguf.head import is_gguf
from ..checkpoint.gguf.model import load_gguf_resident, open_gguf_model
from ..checkpoint.model_folder import Sketch, local_folder, sketch_of
from ..checkpoint.plain_weights import expect_plain_weights
from ..checkpoint.resident_weights import drop_expert_weights, load_resident
from ..checkpoint.tensors import TensorEntry
from ..compute.resident import store_linears
from ..formats.catalogue import form_in_place
from ..formats.form import Form, MatrixEncoder
from ..formats.gguf_blocks.expand import expand_tensor
from ..formats.gguf_blocks.form import gguf_forms
from ..formats.gguf_blocks.matrix import block_linear
from ..formats.resident.coded import coded_linear
from ..formats.resident.linears import IsMultiplied, StoredLinear, find_stored, hold_stored
from ..memory.budget import resident_bytes
from ..neurons.bundle import Bundle, is_bundle, read_bundle
from ..neurons.packing import find_units
from ..store.packing import Pack, read_pack
from ..window.guests import Guests, find_guests
from ..window.planning import WindowPlan
from .options import LoadOptions, Part
from .runtime import IMPLEMENTATION

DENSE = "a dense model, which is computed on the CPU; it has no experts"
BY_UNITS = "experts come by units, which are computed on the CPU; no slot holds a whole one"


@dataclass(frozen=True, kw_only=True, eq=False)
class OpenedCheckpoint:
    """A checkpoint that can be divided and assembled.

    Args:
        model: without expert weights; a skeleton on the meta device if nothing was loaded.
        forms: how each layer's experts are stored, and where.
        checksums: XXH3 of each expert of each layer, where a packed copy has them.
        process_bytes: memory of the process without this model.
        guests: what could be streamed.
        window: what is; None if everything outside experts stays in memory.
        left_out: full names of parameters that are neither loaded nor read.
        own_L: the experts of each layer that this process computes; None for all.
        packed: the packed copy that is read; None without one.
        bundle: feed-forwards, or the experts of a mixture, by their units; None without one. Such experts have no form.
        unit_slots: units of each layer of it that stay in memory; empty before that is known.
        stored: linear layers that are held as the checkpoint stores them, by the full name of their weight.
    """

    model: Any
    forms: list[Form]
    checksums: list[list[str]] | None
    process_bytes: int
    guests: Guests = field(default_factory=Guests)
    window: WindowPlan | None = None
    left_out: frozenset[str] = frozenset()
    own_L: tuple[tuple[int, ...], ...] | None = None
    packed: Pack | None = None
    bundle: Bundle | None = None
    unit_slots: tuple[int, ...] = ()
    stored: Mapping[str, StoredLinear] = field(default_factory=dict)

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def experts_L(self) -> list[int]:
        """Experts of each layer."""
        return [form.layer.num_experts for form in self.forms]

    @property
    def most_slots_L(self) -> list[int]:
        """Slots of each layer that are of use: one for each expert that this process computes."""
        return self.experts_L if self.own_L is None else [max(len(experts), 1) for experts in self.own_L]

    @property
    def slot_bytes_L(self) -> list[int]:
        """Bytes of one RAM slot of each layer."""
        return [form.slot_bytes for form in self.forms]

    @property
    def whole_bytes(self) -> int:
        """Bytes of slots for all experts of this process, each of its own size where it has all of them."""
        if self.own_L is not None:
            return sum(count * size for count, size in zip(self.most_slots_L, self.slot_bytes_L, strict=True))
        return sum(sum(form.own_slot_bytes) for form in self.forms)

    @property
    def top_k(self) -> int:
        """Experts that a token visits in each layer; 0 in a dense model."""
        return experts_per_token(self.config) if experts_modules(self.model) else 0

    @property
    def streamed(self) -> frozenset[str]:
        """Full names of the parameters outside experts that are not in memory."""
        names = self.left_out if self.window is None else self.left_out | self.window.names
        return names if self.bundle is None else names | self.bundle.weight_names

    @property
    def linears(self) -> MatrixEncoder | None:
        """The form in which linear layers are held beside these experts; None as they are."""
        return linears_of(self.forms)


def linears_of(forms: Sequence[Form]) -> MatrixEncoder | None:
    """What the forms of the layers want for linear layers: the first that wants anything decides."""
    return next((form.linears for form in forms if form.linears is not None), None)


Chooser = Callable[[OpenedCheckpoint], WindowPlan | None]


def _never(shape: tuple[int, int]) -> bool:
    """Every linear layer is expanded when it is loaded."""
    return False


def open_checkpoint(
    options: LoadOptions, choose: Chooser = lambda headers: None, is_multiplied: IsMultiplied = _never
) -> OpenedCheckpoint:
    """Load everything of a model but its experts and what is streamed, and find these.

    Args:
        options: what to open, and in which dtype.
        choose: says what is streamed, of a model of which nothing is loaded yet.
        is_multiplied: which shapes stay as they are stored, in linear layers that the checkpoint quantises.

    Raises:
        ValueError: if the checkpoint is damaged or incomplete, or its experts cannot be offloaded.
    """
    folder = local_folder(options.path_or_id)
    if is_gguf(folder):
        return _with_part(_open_gguf(folder, options, is_multiplied), options.part)
    sketch, entries = sketch_of(folder, options.dtype, needs_experts=False)
    if not experts_modules(sketch.skeleton):
        _expect_no_slots(options, f"model {folder}: {DENSE}")
    elif options.pack is not None and is_bundle(Path(options.pack)):
        _expect_no_slots(options, f"bundle {options.pack}: {BY_UNITS}", may_be_part=False)
    headers = _opened_sketch(sketch, entries, options.pack, is_multiplied)
    headers = _with_part(headers, options.part)
    if headers.bundle is not None and options.resident_layers is not None:
        raise ValueError("layers stay whole, or their feed-forwards come by units; leave resident_layers or pack out")
    if headers.bundle is not None and options.adapter is not None:
        raise ValueError("an adapter changes which units are active; merge it and pack the result, or leave pack out")
    window = None if headers.left_out else choose(headers)
    headers = replace(headers, window=window)
    model = load_resident(sketch, entries, IMPLEMENTATION, headers.streamed | headers.stored.keys())
    # hollow experts must be gone before anything looks at the size of the model's parameters
    drop_expert_weights(model)
    if (linears := headers.linears) is not None:
        store_linears(model, linears, headers.streamed)
    hold_stored(model, headers.stored)
    return replace(headers, model=model)


def _with_part(opened: OpenedCheckpoint, part: Part | None) -> OpenedCheckpoint:
    """A checkpoint of which a process has a part.

    Raises:
        ValueError: if the model has no experts.
    """
    if part is None:
        return opened
    if not opened.forms:
        raise ValueError("this model has no experts to spread over processes")
    own_L = tuple(tuple(experts) for experts in part.experts_of(opened.experts_L))
    left_out = frozenset() if part.has_rest else _outside_experts(opened.model)
    return replace(opened, own_L=own_L, left_out=left_out)


def _outside_experts(model: Any) -> frozenset[str]:
    inside = tuple(f"{name}." for name in experts_modules(model))
    names = (name for name, _ in model.named_parameters(remove_duplicate=False))
    return frozenset(name for name in names if not name.startswith(inside))


def _opened_sketch(
    sketch: Sketch, entries: Mapping[str, TensorEntry], pack: str | Path | None, is_multiplied: IsMultiplied
) -> OpenedCheckpoint:
    """A checkpoint of which nothing is loaded: forms of its experts, and what could be streamed."""
    # once the model's code is imported, and before any weight comes
    process_bytes = resident_bytes()
    expect_plain_weights(sketch.folder, sketch.skeleton, entries, sketch.found)
    layers = sketch.layers(entries)
    forms: list[Form] = [form_in_place(layer) for layer in layers]
    checksums, packed, bundle = None, None, None
    if pack is not None and is_bundle(Path(pack)):
        bundle, forms = read_bundle(Path(pack), find_units(sketch, entries, layers)), []
    elif pack is not None:
        packed = read_pack(Path(pack), layers, entries)
        forms, checksums = packed.forms, packed.checksums
    drop_expert_weights(sketch.skeleton)
    return OpenedCheckpoint(
        model=sketch.skeleton,
        forms=forms,
        checksums=checksums,
        process_bytes=process_bytes,
        guests=find_guests(sketch.skeleton, entries, sketch.found, bundle.weight_names if bundle else frozenset()),
        packed=packed,
        bundle=bundle,
        stored=_hold_on_meta(
            sketch.skeleton,
            lambda name: coded_linear(name, entries, sketch.found),
            is_multiplied if bundle is None else _never,  # its units are plain
        ),
    )


def _hold_on_meta(
    skeleton: Any, place: Callable[[str], StoredLinear | None], is_multiplied: IsMultiplied
) -> dict[str, StoredLinear]:
    """Find the linear layers that stay as they are stored, and give the skeleton their sizes."""
    stored = find_stored(skeleton, place, is_multiplied)
    hold_stored(skeleton, stored)
    return stored


def _open_gguf(file: Path, options: LoadOptions, is_multiplied: IsMultiplied) -> OpenedCheckpoint:
    """Load everything of a GGUF model but its experts; all of a dense one."""
    _expect_no_pack(file, options.pack)
    opened = open_gguf_model(file, options.dtype)
    if not opened.names.experts:
        _expect_no_slots(options, f"model {file}: {DENSE}")
    process_bytes = resident_bytes()
    is_part = options.part is not None and not options.part.has_rest
    left_out = _outside_experts(opened.skeleton) if is_part else frozenset()
    stored = {} if is_part else find_stored(opened.skeleton, lambda name: block_linear(name, opened), is_multiplied)
    model = load_gguf_resident(opened, IMPLEMENTATION, expand_tensor, left_out | stored.keys())
    forms = gguf_forms(opened)
    drop_expert_weights(model)
    hold_stored(model, stored)
    return OpenedCheckpoint(model=model, forms=forms, checksums=None, process_bytes=process_bytes, stored=stored)


def _expect_no_slots(options: LoadOptions, what: str, *, may_be_part: bool = True) -> None:
    """Refuse what is said about whole experts where none come: of a dense model, or of one whose experts come by units.

    Args:
        options: what the caller asked for.
        what: is loaded, and what it lacks, for the message.
        may_be_part: whether other processes can compute a share of its experts.
    """
    said = {
        "record_trace": options.record_trace,
        "cache_experts": options.cache_experts is not None,
        "plan": options.plan is not None,
        "prefetch": options.prefetch not in ("auto", "off"),
        "part": options.part is not None and not may_be_part,
        "device": options.device not in ("auto", "cpu") or options.gpu_memory != "auto",
    }
    if wrong := [name for name, is_said in said.items() if is_said]:
        raise ValueError(f"{what} for {wrong[0]} to act on")


def _open_gguf_heads(file: Path, pack: str | Path | None, is_multiplied: IsMultiplied) -> OpenedCheckpoint:
    """Open a GGUF model for planning."""
    _expect_no_pack(file, pack)
    process_bytes, opened = resident_bytes(), open_gguf_model(file)
    forms = gguf_forms(opened)
    drop_expert_weights(opened.skeleton)
    stored = _hold_on_meta(opened.skeleton, lambda name: block_linear(name, opened), is_multiplied)
    return OpenedCheckpoint(
        model=opened.skeleton, forms=forms, checksums=None, process_bytes=process_bytes, stored=stored
    )


def _expect_no_pack(file: Path, pack: str | Path | None) -> None:
    if pack is not None:
        raise ValueError(f"model {file}: a GGUF file is read as it is; leave out the packed copy {pack}")


def open_headers(
    path_or_id: str | Path, pack: str | Path | None, is_multiplied: IsMultiplied = _never
) -> OpenedCheckpoint:
    """Open a checkpoint for planning: from headers alone, without a weight, as if it were loaded in this process.

    Raises:
        ValueError: if the checkpoint is damaged or its experts cannot be offloaded.
    """
    place = local_folder(path_or_id)
    if is_gguf(place):
        return _open_gguf_heads(place, pack, is_multiplied)
    sketch, entries = sketch_of(place, "auto", needs_experts=False)
    return _opened_sketch(sketch, entries, pack, is_multiplied)

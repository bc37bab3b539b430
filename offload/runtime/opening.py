"""A checkpoint opened: the model without its experts, and how each layer's experts are stored."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from routing.ground.model_config import experts_per_token

from ..checkpoint.experts import experts_modules, locate_experts, weight_names
from ..checkpoint.gguf.head import is_gguf
from ..checkpoint.gguf.model import load_gguf_resident, open_gguf_model
from ..checkpoint.model_folder import local_folder, read_config, read_weights, skeleton_of
from ..checkpoint.resident_weights import drop_expert_weights, load_resident
from ..compute.resident import store_linears
from ..formats.catalogue import form_in_place
from ..formats.form import Form, MatrixForm
from ..formats.gguf_blocks.expand import expand_tensor
from ..formats.gguf_blocks.form import gguf_forms
from ..memory.budget import resident_bytes
from ..store.packing import Pack, read_pack
from .options import LoadOptions
from .runtime import IMPLEMENTATION


@dataclass(frozen=True, kw_only=True, eq=False)
class OpenedCheckpoint:
    """A checkpoint that can be divided and assembled.

    Args:
        model: without expert weights; a skeleton on the meta device if nothing was loaded.
        forms: how each layer's experts are stored, and where.
        checksums: XXH3 of each expert of each layer, where a packed copy has them.
        process_bytes: memory of the process without this model.
        packed: the packed copy that is read; None without one.
    """

    model: Any
    forms: list[Form]
    checksums: list[list[str]] | None
    process_bytes: int
    packed: Pack | None = None

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def experts_L(self) -> list[int]:
        """Experts of each layer."""
        return [form.layer.num_experts for form in self.forms]

    @property
    def slot_bytes_L(self) -> list[int]:
        """Bytes of one RAM slot of each layer."""
        return [form.slot_bytes for form in self.forms]

    @property
    def whole_bytes(self) -> int:
        """Bytes of slots for all experts, each of its own size."""
        return sum(sum(form.own_slot_bytes) for form in self.forms)

    @property
    def top_k(self) -> int:
        """Experts that a token visits in each layer; 0 in a dense model."""
        return experts_per_token(self.config) if self.forms else 0

    @property
    def linears(self) -> MatrixForm | None:
        """The form in which linear layers are held beside these experts; None as they are."""
        return linears_of(self.forms)


def linears_of(forms: Sequence[Form]) -> MatrixForm | None:
    """What the forms of the layers want for linear layers: the first that wants anything decides."""
    return next((form.linears for form in forms if form.linears is not None), None)


def open_checkpoint(options: LoadOptions) -> OpenedCheckpoint:
    """Load everything of a model but its experts, and find these.

    Raises:
        ValueError: if the checkpoint is damaged or incomplete, or its experts cannot be offloaded.
    """
    folder = local_folder(options.path_or_id)
    if is_gguf(folder):
        return _open_gguf(folder, options)
    config = read_config(folder)
    entries, dtype = read_weights(folder, config, options.dtype)
    # before the weights come, so that they are not counted twice
    process_bytes = resident_bytes()
    model = load_resident(folder, config, entries, dtype, IMPLEMENTATION)
    dtypes = {name: parameter.dtype for name, parameter in model.state_dict().items()}
    layers = locate_experts(model, entries, dtypes)
    forms: list[Form] = [form_in_place(layer) for layer in layers]
    checksums, packed = None, None
    if options.pack is not None:
        packed = read_pack(Path(options.pack), layers, entries)
        forms, checksums = packed.forms, packed.checksums
    # hollow experts must be gone before anything looks at the size of the model's parameters
    drop_expert_weights(model)
    if (linears := linears_of(forms)) is not None:
        store_linears(model, linears)
    return OpenedCheckpoint(model=model, forms=forms, checksums=checksums, process_bytes=process_bytes, packed=packed)


def _open_gguf(file: Path, options: LoadOptions) -> OpenedCheckpoint:
    """Load everything of a GGUF model but its experts; all of a dense one."""
    _expect_no_pack(file, options.pack)
    opened = open_gguf_model(file, options.dtype)
    if not opened.names.experts:
        _expect_dense_options(file, options)
    process_bytes = resident_bytes()
    model = load_gguf_resident(opened, IMPLEMENTATION, expand_tensor)
    forms = gguf_forms(opened)
    drop_expert_weights(model)
    return OpenedCheckpoint(model=model, forms=forms, checksums=None, process_bytes=process_bytes)


def _expect_dense_options(file: Path, options: LoadOptions) -> None:
    """Refuse what is said about experts to a model that has none."""
    said = {
        "record_trace": options.record_trace,
        "cache_experts": options.cache_experts is not None,
        "plan": options.plan is not None,
        "prefetch": options.prefetch not in ("auto", "off"),
        "device": options.device not in ("auto", "cpu") or options.gpu_memory != "auto",
    }
    if wrong := [name for name, is_said in said.items() if is_said]:
        raise ValueError(
            f"model {file}: a dense model, all of whose layers stay in RAM and are computed on the CPU; "
            f"it has no experts for {wrong[0]} to act on"
        )


def _open_gguf_heads(file: Path, pack: str | Path | None) -> OpenedCheckpoint:
    """Open a GGUF model for planning."""
    _expect_no_pack(file, pack)
    process_bytes, opened = resident_bytes(), open_gguf_model(file)
    forms = gguf_forms(opened)
    drop_expert_weights(opened.skeleton)
    return OpenedCheckpoint(model=opened.skeleton, forms=forms, checksums=None, process_bytes=process_bytes)


def _expect_no_pack(file: Path, pack: str | Path | None) -> None:
    if pack is not None:
        raise ValueError(f"model {file}: a GGUF file is read as it is; leave out the packed copy {pack}")


def open_headers(path_or_id: str | Path, pack: str | Path | None) -> OpenedCheckpoint:
    """Open a checkpoint for planning: from headers alone, without a weight, as if it were loaded in this process.

    Raises:
        ValueError: if the checkpoint is damaged or its experts cannot be offloaded.
    """
    place = local_folder(path_or_id)
    if is_gguf(place):
        return _open_gguf_heads(place, pack)
    process_bytes = resident_bytes()
    skeleton, entries, layers = skeleton_of(place)
    packed = None if pack is None else read_pack(Path(pack), layers, entries)
    forms: list[Form] = [form_in_place(layer) for layer in layers] if packed is None else packed.forms
    for module in experts_modules(skeleton).values():
        for name in weight_names(module):
            delattr(module, name)
    return OpenedCheckpoint(model=skeleton, forms=forms, checksums=None, process_bytes=process_bytes, packed=packed)

"""A run that starts from a checkpoint: its settings, its tokenizer, and its weights in the model that is trained."""

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe import MoEForCausalLM


def settings_of(folder: Path) -> dict[str, Any]:
    """The model's settings of a checkpoint, as `TrainConfig.model` has them.

    Raises:
        ValueError: if there is no checkpoint, or our decoder cannot express it.
    """
    from moe import MoEConfig, adopted_config

    config = adopted_config(folder)
    own = [field.name for field in fields(MoEConfig) if field.name in MoEConfig.__annotations__]
    return {name: getattr(config, name) for name in own if getattr(config, name) != getattr(MoEConfig, name)}


def tokenizer_of(folder: Path, model: dict[str, Any]) -> str | None:
    """The tokenizer of a checkpoint, as `Text.tokenizer`: the folder, or None for a model that reads bytes.

    Raises:
        ValueError: if it has none and its tokens cannot be bytes.
    """
    from moe import ByteText, text_of

    vocab_size = model.get("vocab_size", 256)
    found = text_of(folder, vocab_size)
    if isinstance(found, ByteText) or (vocab_size == 256 and _reads_bytes(found)):
        return None
    return str(folder)


def load_start(folder: str, model: "MoEForCausalLM") -> None:
    """Put the weights of a checkpoint into a model that was built for a run.

    Raises:
        ValueError: if the model was given another shape or other parts than the checkpoint has.
    """
    from moe import adopt

    try:
        model.load_state_dict(adopt(Path(folder)).state_dict())
    except RuntimeError as error:
        raise ValueError(
            f"{folder} does not fit this model ({' '.join(str(error).split())[:400]}); leave out settings that change "
            "its shape or its router"
        ) from error


def _reads_bytes(text: Any) -> bool:
    """Whether a tokenizer's ids are the bytes of the text, as in the folders of byte models of ours."""
    sample = "".join(map(chr, range(1, 128))) + "äλ語"
    return text.encode(sample) == list(sample.encode("utf-8"))

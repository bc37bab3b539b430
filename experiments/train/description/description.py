"""RunDescription: a run as its file says it, merged from a preset, a file and options; read, checked and written."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, create_model

from ..presets import preset
from ..text.chosen import Text
from .config import TrainConfig
from .rate_laws import RATE_LAWS, RunSize
from .settings_file import assigned, expect_known, explained, merged, read_settings, write_settings
from .sizes import EXPERT_SIZES, SIZES, parse_count, solved_shape

RUN_FILE = "run.yaml"
DEFAULT_PRESET, NO_PRESET = "demo", "none"
TEXT_KEYS = tuple(field.name for field in fields(Text))
SETTINGS = tuple(field.name for field in fields(TrainConfig) if field.name != "model")
ASKED = ("preset", "router", "params", "active")
"""What a file may ask for instead of saying it: a parent (or none), a variant's router, a size to solve a shape for."""
# numbers of a model that may be nothing, and rates that must be above it; other whole numbers are at least 1
MAY_BE_ZERO = ("num_dense_layers", "num_shared_experts", "bos_token_id", "eos_token_id", "pad_token_id")
POSITIVE = ("rope_theta", "rms_norm_eps", "initializer_range")


@dataclass(frozen=True, kw_only=True)
class RunDescription:
    """Everything that a run depends on.

    Args:
        text: what is read.
        config: how is trained.
        notes: what was chosen where only a wish was given, a line each.
    """

    text: Text
    config: TrainConfig
    notes: tuple[str, ...] = ()


def described(
    file: Path | None = None, settings: Sequence[str] = (), options: Mapping[str, Any] | None = None
) -> RunDescription:
    """The run that a file, `--set` options and options of the command line describe, the later ones first.

    Args:
        file: a description, such as the `run.yaml` of a run; None for none.
        settings: `key=value` each.
        options: by the names that a file has for them; None stands for one that was not given.

    Raises:
        ValueError: if a setting is unknown, of another type or out of range, or settings do not fit together.
    """
    said = {name: value for name, value in (options or {}).items() if value is not None}
    if "data" in said:  # another text than that of the file
        said = {"text_fingerprint": None} | said
    given = merged({} if file is None else read_settings(file), said, assigned(settings))
    source = str(file) if file else "--set" if settings else "options"
    model = given.pop("model", {})
    if not isinstance(model, dict):
        raise ValueError(f"{source}: expected settings below model, such as model.num_experts=64; got {model!r}")
    names = [*given, *(f"model.{name}" for name in model)]
    expect_known(names, [*ASKED, *TEXT_KEYS, *SETTINGS, *(f"model.{name}" for name in _model_fields())], source)
    return _resolved(given, _checked_model(model, source), source)


def write_run_file(run: Path, config: TrainConfig, text: Mapping[str, Any]) -> None:
    """Write `run.yaml` into the folder of a run: `expertier train --config` repeats the run from it.

    Args:
        run: its folder, which must exist.
        config: with the precision resolved.
        text: what `Text` has fields for.
    """
    settings = {"preset": NO_PRESET} | dict(text) | asdict(config)
    settings["betas"] = list(config.betas)
    write_settings(run / RUN_FILE, settings, "expertier train --config FILE --out DIR repeats this run")


def _resolved(given: dict[str, Any], model: dict[str, Any], source: str) -> RunDescription:
    """The description that settings of known names amount to."""
    name = str(given.pop("preset", None) or DEFAULT_PRESET)
    parent = {"model": {}} if name == NO_PRESET else asdict(preset(name))
    wish = {name: given.pop(name, None) for name in ("router", "params", "active")}
    if given.get("start_from") is not None:
        given["start_from"] = str(Path(str(given["start_from"])).absolute())
    text = _built(Text, {name: given.pop(name) for name in TEXT_KEYS if name in given}, source)
    start_from = given.get("start_from")
    sizes, notes = _model(parent["model"], model, wish, text, start_from)
    if start_from is not None and text.tokenizer is None:
        from .starting import tokenizer_of

        text = replace(text, tokenizer=tokenizer_of(Path(start_from), sizes))
    values = _with_followers(parent, given)
    law = values.get("learning_rate") if str(values.get("learning_rate")) in RATE_LAWS else None
    if law is not None:
        values |= {"learning_rate": 1.0, "min_learning_rate": 0.0}  # until the run's size is known
    config = _built(TrainConfig, values | {"model": sizes}, source)
    if law is not None:
        config, note = _by_law(law, config, given)
        notes.append(note)
    if config.min_learning_rate > config.learning_rate:
        raise ValueError(
            f"{source}: min_learning_rate {config.min_learning_rate:g} is above the peak {config.learning_rate:g}; "
            "lower it, or leave it out"
        )
    if config.warmup_steps > config.steps:
        raise ValueError(
            f"{source}: warmup_steps {config.warmup_steps} is more than the {config.steps} steps, so the rate would "
            "never reach its peak; lower it, or leave it out"
        )
    return RunDescription(text=text, config=config, notes=tuple(notes))


def _with_followers(parent: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The parent's settings under those that were given; a last rate and a warm-up that were not given follow.

    The last rate keeps its share of the peak. A warm-up that is longer than the run is cut.
    """
    values = parent | given
    peak, steps = given.get("learning_rate"), given.get("steps")
    if "min_learning_rate" in parent and "min_learning_rate" not in given and isinstance(peak, float) and peak > 0:
        values["min_learning_rate"] = peak * parent["min_learning_rate"] / parent["learning_rate"]
    if "warmup_steps" in parent and "warmup_steps" not in given and type(steps) is int and steps > 0:
        values["warmup_steps"] = min(parent["warmup_steps"], steps)
    return values


def _by_law(law: str, config: TrainConfig, given: Mapping[str, Any]) -> tuple[TrainConfig, str]:
    """The run with the rate that a law gives it; a last rate that was not given is a tenth of it."""
    size = run_size(config)
    rate = RATE_LAWS[law](size).learning_rate
    last = given.get("min_learning_rate", rate / 10)
    note = f"{law}: learning rate {rate:.4g} for {size.parameters:,.0f} parameters and {size.tokens:,.0f} tokens"
    return replace(config, learning_rate=rate, min_learning_rate=last), note


def run_size(config: TrainConfig) -> RunSize:
    """What laws look at: parameters without embedding and head, tokens, and forward FLOPs per token.

    A parameter that a token visits costs two operations; attention's scores and values are added over the mean number
    of visible positions.
    """
    from ..fitting import model_sizes

    sizes, model = model_sizes(config.model), _filled(config.model)
    embeddings = sizes["embeddings"]
    visible = (config.sequence_length + 1) / 2
    attention = 4 * model["num_hidden_layers"] * model["num_attention_heads"] * model["head_dim"] * visible
    return RunSize(
        parameters=sizes["parameters"] - embeddings,
        tokens=config.steps * config.accumulation * config.batch_size * config.sequence_length,
        flops_per_token=2 * (sizes["active_parameters"] - embeddings) + attention,
    )


def _model(
    parent: dict[str, Any], said: dict[str, Any], wish: Mapping[str, Any], text: Text, start_from: str | None
) -> tuple[dict[str, Any], list[str]]:
    """The model's settings, and what there is to say about how they were found."""
    from ..fitting import expect_buildable, fitting_model

    notes: list[str] = []
    if start_from is not None:
        from .starting import settings_of

        if wish["params"] is not None or wish["active"] is not None:
            raise ValueError("--from brings a model with its own shape; leave --params and --active out")
        parent = settings_of(Path(start_from))
    model = parent | said
    if wish["params"] is not None:
        model = _solved(model, said, wish, text)
    elif wish["active"] is not None:
        raise ValueError("active says what a token visits of params; give params as well")
    if wish["router"] is not None:
        model = fitting_model(str(wish["router"]), model) | said
    expect_buildable(model)
    if wish["params"] is not None:
        notes.append(_described_shape(model | {"vocab_size": _vocabulary(model, text)}))
    return model, notes


def _solved(model: dict[str, Any], said: Mapping[str, Any], wish: Mapping[str, Any], text: Text) -> dict[str, Any]:
    filled = _filled(model)
    if filled["architecture"] != "moe" or filled["zero_compute_experts"]:
        raise ValueError("params solves shapes of plain mixtures of experts; give the sizes of this model one by one")
    filled["vocab_size"] = _vocabulary(model, text)
    wanted = {name: said[name] for name in (*SIZES, *EXPERT_SIZES) if name in said}
    active = None if wish["active"] is None else parse_count(wish["active"])
    return model | solved_shape(parse_count(wish["params"]), active, filled, wanted)


def _vocabulary(model: Mapping[str, Any], text: Text) -> int:
    """V: as it is set, or that of the tokenizer, or the bytes."""
    if "vocab_size" in model or text.tokenizer is None:
        return _filled(model)["vocab_size"]
    from ..text.tokens import Encoder

    text.expect_there()
    return Encoder(text.tokenizer).vocab_size


def _described_shape(model: dict[str, Any]) -> str:
    from ..fitting import model_sizes

    sizes = model_sizes(model)
    return (
        f"chosen: {model['num_hidden_layers']} layers x {model['hidden_size']}, {model['num_experts']} experts "
        f"of width {model['moe_intermediate_size']}, {model['num_experts_per_tok']} per token: "
        f"{sizes['parameters'] / 1e6:.2f} M parameters, {sizes['active_parameters'] / 1e6:.2f} M active"
    )


def _filled(model: Mapping[str, Any]) -> dict[str, Any]:
    """A model's settings with the defaults of those that are not set."""
    from moe import MoEConfig

    return {field.name: getattr(MoEConfig, field.name) for field in _own_fields()} | dict(model)


def _built(kind: Any, values: dict[str, Any], source: str) -> Any:
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        raise explained(error, source) from error


def _checked_model(model: dict[str, Any], source: str) -> dict[str, Any]:
    """Settings of a model, of the types and in the ranges that `MoEConfig` has for them."""
    try:
        found = _model_schema().model_validate(model).model_dump(exclude_unset=True)
    except ValidationError as error:
        raise explained(error, source, "model.") from error
    return {name: found[name] for name in model}  # in the order of the file


def _own_fields() -> list[Any]:
    """The fields of `MoEConfig` that are its own, not those of every config of transformers."""
    from moe import MoEConfig

    return [field for field in fields(MoEConfig) if field.name in MoEConfig.__annotations__]


def _model_fields() -> list[str]:
    return [field.name for field in _own_fields()]


@cache
def _model_schema() -> Any:
    """A pydantic model of `MoEConfig`'s own fields; whole numbers have ranges, which its class leaves to layers."""
    entries: dict[str, Any] = {}
    for field in _own_fields():
        kind = field.type
        if kind is int:
            # rotary positions turn pairs
            least, step = (2, 2) if field.name == "head_dim" else (0 if field.name in MAY_BE_ZERO else 1, 1)
            kind = Annotated[int, Field(ge=least, multiple_of=step, strict=True)]
        elif kind is float:
            kind = Annotated[float, Field(gt=0 if field.name in POSITIVE else None, allow_inf_nan=False)]
        entries[field.name] = (kind, None)
    return create_model("ModelSettings", __config__=ConfigDict(extra="forbid"), **entries)

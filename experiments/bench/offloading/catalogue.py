"""CONTESTANTS: who runs in `expertier bench offload` on the CPU, one row each. Nothing here imports torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from routing.ground.expect import expect_name

Engine = Literal["ours", "transformers", "accelerate", "llama.cpp"]
Copy = Literal["", "compressed", "int4"]


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """How one contestant loads and runs the checkpoint.

    Args:
        engine: the program that computes; `ours` is `offload.load`, `transformers` keeps all weights in memory.
        needs_limit: True if it runs only under a memory limit, False if only without one, None if under both.
        copy: form of the packed copy that experts are read from, which is written if it is missing; empty for none.
        is_ahead: whether it prefetches by the file of `--predictor`.
        arguments: further arguments of `offload.load`.
        is_default: whether it runs if `--contestant` names nobody.
    """

    engine: Engine = "ours"
    needs_limit: bool | None = None
    copy: Copy = ""
    is_ahead: bool = False
    arguments: Mapping[str, Any] = field(default_factory=dict)
    is_default: bool = False

    def runs_under(self, limit: str) -> bool:
        """Whether it takes part at a limit; `none` is no limit."""
        return self.needs_limit is None or self.needs_limit == (limit != "none")

    def reads(self, form: str) -> bool:
        """Whether it reads experts of a stored form.

        Codes are not packed in another form, and transformers needs the libraries and GPUs of their owners. llama.cpp
        says in its row where GGUF has no type for them.
        """
        return form == "plain" or self.engine == "llama.cpp" or (self.engine == "ours" and not self.copy)


# in the order in which they run
CONTESTANTS: Mapping[str, Contestant] = {
    "ours-compressed": Contestant(copy="compressed", is_default=True),
    "ours": Contestant(is_default=True),
    "ours-fast": Contestant(arguments={"arithmetic": "fast"}, is_default=True),
    "ours-lru": Contestant(arguments={"policy": "lru"}, is_default=True),
    "accelerate": Contestant(engine="accelerate", needs_limit=True, is_default=True),
    "resident": Contestant(engine="transformers", needs_limit=False, is_default=True),
    "llama.cpp": Contestant(engine="llama.cpp", is_default=True),
    "ours-ahead": Contestant(is_ahead=True),
    "ours-predicted": Contestant(is_ahead=True, arguments={"policy": "predicted"}),
    "ours-compressed-ahead": Contestant(copy="compressed", is_ahead=True),
    "ours-compressed-fast": Contestant(copy="compressed", arguments={"arithmetic": "fast"}),
    "ours-compressed-lru": Contestant(copy="compressed", arguments={"policy": "lru"}),
    # lossy: by HQQ
    "ours-int4": Contestant(copy="int4"),
    "ours-lfu": Contestant(arguments={"policy": "lfu"}),
    "ours-static": Contestant(arguments={"policy": "static"}),
    "ours-eam": Contestant(arguments={"policy": "eam"}),
    "ours-score": Contestant(arguments={"policy": "score"}),
    "ours-learned": Contestant(arguments={"policy": "learned"}),
}


def defaults_of(form: str) -> tuple[str, ...]:
    """Who runs if `--contestant` names nobody, on experts of a stored form."""
    return tuple(name for name, row in CONTESTANTS.items() if row.is_default and row.reads(form))


def find_contestant(name: str) -> Contestant:
    """The row of a name.

    Raises:
        ValueError: if there is no such contestant; the message suggests the nearest name.
    """
    return CONTESTANTS[expect_name(name, CONTESTANTS, "contestant")]


def check_contestants(names: tuple[str, ...], predictor: object, form: str = "plain") -> None:
    """Refuse who cannot run before anything runs: unknown, without its predictor, or unable to read the form.

    Raises:
        ValueError: in all cases.
    """
    for name in names:
        if find_contestant(name).is_ahead and predictor is None:
            raise ValueError(f"{name} needs --predictor; make one with `expertier trace predictor`")
        if not find_contestant(name).reads(form):
            raise ValueError(f"{name} cannot read experts as {form}; {', '.join(defaults_of(form))} can")

"""How an engine serves. Without torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from routing.ground.expect import expect_choice
from routing.ground.quantity import parse_size

SCHEDULES = ("auto", "turns", "together")
LOOKUPS = ("auto", "off", "always")
REUSES = ("auto", "any", "aligned", "off")
ORDERS = ("auto", "arrival")


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """Limits and choices of an engine.

    Args:
        most_users: requests whose answers are generated at the same time, 1 or more.
        most_queued: requests that wait at most; a further one is refused with `QueueFull`. 0 lets nobody wait.
        most_new_tokens: most tokens that one request may ask for.
        schedule: `turns` generates for one user, then for the next; `together` computes one token of all users in each
            step; `auto` takes what is predicted to take fewer seconds per token, and never `together` where that would
            change the bits that the model promises.
        longest_wait_s: seconds that a user waits for his next turn at most, as far as a turn of one token allows.
        decode_share: share of the time, 0 to below 1, that running answers keep while prompts are read.
        lookup: `auto` proposes tokens that followed the same words before, where that is exact and pays; `off` never;
            `always` for tests and measurements.
        reuse: which kept keys and values a new prompt starts from. `any` common prefix; `aligned` whole pieces of a
            prefill, whose bits are those of a cold start at every level; `off` none. `auto` is `any` where the level
            allows it, and `aligned` elsewhere.
        piece_tokens: tokens of a prompt that are computed at once, 1 or more. Each piece reads nearly all experts, and
            whole pieces are what `aligned` can reuse. None takes as many as memory allows.
        order: who of those who wait starts next. `arrival` goes by arrival, users in turn; `auto` prefers who is
            foreseen to use the experts of running answers, where something foresees; at most four overtake one.
        prefix_folder: where kept prefixes are written, so that they survive a restart; None keeps them in RAM only.
        prefix_disk: most bytes in that folder, such as `"8GiB"`.

    Raises:
        ValueError: if a value is out of range.
    """

    most_users: int = 8
    most_queued: int = 16
    most_new_tokens: int = 4096
    schedule: Literal["auto", "turns", "together"] = "auto"
    longest_wait_s: float = 15.0
    decode_share: float = 0.3
    lookup: Literal["auto", "off", "always"] = "auto"
    reuse: Literal["auto", "any", "aligned", "off"] = "auto"
    piece_tokens: int | None = None
    order: Literal["auto", "arrival"] = "auto"
    prefix_folder: Path | None = None
    prefix_disk: str | int = "8GiB"

    def __post_init__(self) -> None:
        for name, least in (("most_users", 1), ("most_queued", 0), ("most_new_tokens", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}; got {getattr(self, name)}")
        if self.piece_tokens is not None and self.piece_tokens < 1:
            raise ValueError(f"piece_tokens must be at least 1; got {self.piece_tokens}")
        if not self.longest_wait_s > 0:
            raise ValueError(f"longest_wait_s must be above 0; got {self.longest_wait_s}")
        if not 0 <= self.decode_share < 1:
            raise ValueError(f"decode_share must be 0 to below 1; got {self.decode_share}")
        expect_choice(self.schedule, SCHEDULES, "schedule")
        expect_choice(self.lookup, LOOKUPS, "lookup")
        expect_choice(self.reuse, REUSES, "reuse")
        expect_choice(self.order, ORDERS, "order")
        parse_size(self.prefix_disk)

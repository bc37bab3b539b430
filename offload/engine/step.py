"""One step of the model, for one sequence or for several.

A step of one sequence is the call that `generate` makes. In a packed step the rows of all sequences stand behind each
other in a batch of one: embeddings, norms, linear layers, routers and experts see them together, attention does not.

Shapes: V vocabulary; N rows.
"""

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from routing.ground.model_config import text_config

from .kept.cached import CachedTokens, is_plain
from .packing import JoinedCache, PackedAttention, Piece, attending

PACKED_LAYERS = {"full_attention", "sliding_attention"}
LOGITS_OPTIONS = ("logits_to_keep", "num_logits_to_keep")
TRIAL_TOLERANCE = 0.05
"""Most that logits of the trial may differ, as a share of their range. Float32 logits of 39 small families differ by
less than a millionth; bfloat16 needs room, because rounding may turn the choice of an expert. Not tuned."""


class ModelSteps:
    """The calls of one model.

    Args:
        model: a causal language model of transformers, in eval mode.

    Raises:
        ValueError: if its family keeps its state in a cache of its own.
    """

    def __init__(self, model: Any) -> None:
        if not model._supports_default_dynamic_cache():
            raise ValueError(
                f"{type(model).__name__} keeps its state in a cache of its own, which cannot be shared or kept; "
                "use `expertier generate` for it"
            )
        self.model = model
        known = inspect.signature(model.forward).parameters
        self._logits_option = next((name for name in LOGITS_OPTIONS if name in known), None)
        self._takes_positions = "position_ids" in known
        self._configs = _attention_configs(model)
        self._attention = str(text_config(model.config)._attn_implementation)
        self._is_joined = False
        self._can_pack: bool | None = None

    @property
    def vocab_size(self) -> int:
        return int(text_config(self.model.config).vocab_size)

    def empty(self) -> CachedTokens:
        """The beginning of a sequence."""
        return CachedTokens.empty(self.model.config)

    @property
    def can_pack(self) -> bool:
        """Whether packed steps are right for this family; the first question tries it, in six steps of few tokens."""
        if self._can_pack is None:
            self._can_pack = self._expected_to_pack() and (self._packs_right() or self._packs_right(is_joined=True))
        return self._can_pack

    @torch.no_grad()
    def run(self, pieces: Sequence[Piece]) -> list[torch.Tensor]:
        """Compute one step.

        Args:
            pieces: of different sequences, at least one. Several, or one by rows, need a model that can be packed.

        Returns:
            For each piece, logits `[num_logits, V]`.
        """
        is_alone = len(pieces) == 1 and pieces[0].is_one_call
        logits = [self._alone(pieces[0])] if is_alone else self._packed(pieces)
        for piece in pieces:
            piece.cached.token_ids.extend(piece.token_ids)
            piece.cached.end_logits_V = None
        return logits

    def _alone(self, piece: Piece) -> torch.Tensor:
        ids = torch.tensor([list(piece.token_ids)], device=self.model.device)
        options: dict[str, Any] = {} if self._logits_option is None else {self._logits_option: piece.num_logits}
        if self._takes_positions:
            past = len(piece.cached)
            options["position_ids"] = torch.arange(past, past + ids.shape[1], device=self.model.device)[None]
        output = self.model(input_ids=ids, past_key_values=piece.cached.cache, use_cache=True, **options)
        logits_NV: torch.Tensor = output.logits[0, -piece.num_logits :]
        return logits_NV

    def _packed(self, pieces: Sequence[Piece]) -> list[torch.Tensor]:
        device = self.model.device
        ids = [token_id for piece in pieces for token_id in piece.token_ids]
        places = [len(piece.cached) + offset for piece in pieces for offset in range(len(piece.token_ids))]
        wanted = list(_last_rows(pieces))
        keep = {} if self._logits_option is None else {self._logits_option: torch.tensor(wanted, device=device)}
        packed = PackedAttention(pieces, self._attention)
        cache = JoinedCache(packed, self.model.config) if self._is_joined else None
        with attending(packed, self._configs):
            output = self.model(
                input_ids=torch.tensor([ids], device=device),
                position_ids=torch.tensor([places], device=device),
                past_key_values=cache,
                use_cache=self._is_joined,
                **keep,
            )
        if not packed.num_calls:
            raise RuntimeError("no layer asked transformers' attention interface")
        logits_NV = output.logits[0] if keep else output.logits[0, wanted]
        return list(logits_NV.split([piece.num_logits for piece in pieces]))

    def _expected_to_pack(self) -> bool:
        """Whether all layers are of kinds that packed steps know."""
        kinds = set(getattr(text_config(self.model.config), "layer_types", None) or PACKED_LAYERS)
        return self._takes_positions and kinds <= PACKED_LAYERS and is_plain(self.empty().cache)

    def _packs_right(self, *, is_joined: bool = False) -> bool:
        """Whether two sequences that decode together, and one that reads on, get the logits that each has alone."""
        self._is_joined = is_joined
        ids = [number % self.vocab_size for number in range(3, 19)]
        first, second = self.empty(), self.empty()
        self.run([Piece(cached=first, token_ids=ids[:5])])
        self.run([Piece(cached=second, token_ids=ids[5:8])])
        pieces = [(first, ids[8:9]), (second, ids[9:12])]
        alone = [self.run([Piece(cached=cached.fork(len(cached)), token_ids=new)])[0] for cached, new in pieces]
        try:
            together = self.run([Piece(cached=cached, token_ids=new) for cached, new in pieces])
        except Exception:  # families fail in as many ways as there are; what matters is that this one does
            return False
        return all(
            float((one - other).abs().max()) <= TRIAL_TOLERANCE * float(one.max() - one.min())
            for one, other in zip(alone, together, strict=True)
        )


def _last_rows(pieces: Sequence[Piece]) -> Iterator[int]:
    """Places of the rows whose logits are wanted."""
    first = 0
    for piece in pieces:
        first += len(piece.token_ids)
        yield from range(first - piece.num_logits, first)


def _attention_configs(model: Any) -> list[Any]:
    """The configs from which the model's attention modules read the name of their function."""
    name = text_config(model.config)._attn_implementation
    configs = [
        module.config for module in model.modules() if hasattr(module, "layer_idx") and hasattr(module, "config")
    ]
    mine = {id(config): config for config in configs if getattr(config, "_attn_implementation_internal", None) == name}
    return list(mine.values())

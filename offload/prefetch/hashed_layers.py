"""Layers whose experts follow from token ids alone: what a pass needs of them is read before it begins.

Such a router holds a table of integers with a row for each token id, as the first layers of DeepSeek-V4 do. The table
is found by its shape, in any family. A wrong guess would cost reads, and no bit.

Shapes: V vocabulary, K experts per token, B sequences in a call, S positions of each.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from routing.ground.model_config import experts_per_token, text_config

from ..checkpoint.experts import ExpertLayer
from .lookahead import most_used_first


def find_tables(model: Any, layers: Sequence[ExpertLayer]) -> dict[int, torch.Tensor]:
    """The table of each layer that has one, `[V, K]`: the only buffer of integers of this shape beside its experts."""
    shape = (text_config(model.config).vocab_size, experts_per_token(model.config)) if layers else ()
    found = {}
    for number, layer in enumerate(layers):
        parent = model.get_submodule(layer.module_name.rpartition(".")[0])
        buffers = [buffer for buffer in parent.buffers() if tuple(buffer.shape) == shape]
        tables = [buffer for buffer in buffers if not (buffer.is_floating_point() or buffer.dtype == torch.bool)]
        if len(tables) == 1:
            found[number] = tables[0]
    return found


def token_ids_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
    """The token ids that a model is called with; None if there are none, as where it is given embeddings."""
    token_BS = kwargs.get("input_ids", args[0] if args else None)
    if not isinstance(token_BS, torch.Tensor) or token_BS.is_floating_point() or not token_BS.numel():
        return None
    return token_BS


def read_by_ids(model: Any, tables: Mapping[int, torch.Tensor], ahead: Any) -> None:
    """From now on, say at the beginning of each call what its token ids need.

    Args:
        model: a model with offloaded experts.
        tables: of `find_tables`.
        ahead: a `ReadingAhead`.
    """

    def begin(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        token_BS = token_ids_of(args, kwargs)
        if token_BS is None:
            return
        token_T = token_BS.reshape(-1)
        if int(token_T.min()) < 0 or int(token_T.max()) >= min(map(len, tables.values())):
            return  # the model refuses them
        ahead.read({layer: most_used_first(table[token_T.to(table.device)]) for layer, table in tables.items()})

    if tables:
        # a compiler would trace the reads
        hook = torch.compiler.disable(begin)  # type: ignore[no-untyped-call]
        model.register_forward_pre_hook(hook, with_kwargs=True)

"""Work that is left out while decoding: feed-forwards (FFN-Skip) and whole layers (early exit), on a trained mixture.

Shapes: B sequences, S positions.
"""

from typing import Any

import numpy as np

from ..claim import Row, small_decoder
from ..domains import held_out_rows, tune

DOMAIN = "prose"
LAYERS = 6
"""Enough that half of them can be left out between those that always run."""
PROMPT = 16
"""Bytes of a row that are read at once; the others are decoded one by one, and only they are scored."""
THRESHOLDS = (0.999, 0.99, 0.97, 0.95)
"""Cosines of the stream before and after; FFN-SkipLLM reports no single one."""
WARM_UP = 4
"""Decoded bytes that skip nothing, half of the method's default: rows are short."""


def skip_rows(steps: int, seed: int) -> list[Row]:
    """Bits per byte by the cosine from which feed-forwards are skipped, and the share of them that was."""
    from moe import skip_feed_forward

    model = _trained(steps, seed)
    rows: list[Row] = [{"variant": "all feed-forwards", "bits_per_byte": decoded_bits(model), "skipped": 0.0}]
    for threshold in THRESHOLDS:
        with skip_feed_forward(model, threshold=threshold, warm_up=WARM_UP) as report:
            bits = decoded_bits(model)
        rows.append({"variant": f"skip from {threshold}", "bits_per_byte": bits, "skipped": report.skipped_share})
    return rows


def exit_rows(steps: int, seed: int) -> list[Row]:
    """Bits per byte by the cosine from which tokens leave the decoder, and the layers that they passed."""
    from moe import early_exit

    model = _trained(steps, seed)
    rows: list[Row] = [{"variant": "all layers", "bits_per_byte": decoded_bits(model), "layers": float(LAYERS)}]
    for threshold in THRESHOLDS:
        with early_exit(model, threshold=threshold) as report:
            bits = decoded_bits(model)
        rows.append({"variant": f"exit from {threshold}", "bits_per_byte": bits, "layers": report.mean_layers})
    return rows


def decoded_bits(model: Any) -> float:
    """Mean cross entropy in bits of the bytes that are decoded after the prompt of each held-out row."""
    import torch
    from torch.nn.functional import cross_entropy

    token_BS = held_out_rows(DOMAIN)
    losses = []
    with torch.no_grad():
        output = model(token_BS[:, :PROMPT], use_cache=True)
        for place in range(PROMPT, token_BS.shape[1]):
            losses.append(cross_entropy(output.logits[:, -1].float(), token_BS[:, place]))
            output = model(token_BS[:, place : place + 1], past_key_values=output.past_key_values, use_cache=True)
    return torch.stack(losses).mean().item() / float(np.log(2))


def _trained(steps: int, seed: int) -> Any:
    import torch

    from moe import MoEConfig, MoEForCausalLM

    torch.manual_seed(seed)
    model = MoEForCausalLM(MoEConfig(**small_decoder(vocab_size=256, num_hidden_layers=LAYERS)))
    tune(model, [DOMAIN], steps, seed)
    return model

"""Trains the bit router of a packed copy in levels: gates that spend bits on tokens and experts where they matter.

D2MoE trains by the model's loss. A backward pass needs all experts in memory, so measured costs take its place here:
the squared error of each expert's output for each number of levels, as a share of the layer's, times the layer's
sensitivity. That is the divergence that is expected of it, in nats. The budget is a price of bits in the loss: that at
which rows that knew their costs would spend what was asked for.

Shapes: N rows (a token at one of its experts), D model width, E experts, V levels, L layers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch

from ..formats.lossy.levelled import LevelledForm
from ..ram.bit_router import BitGate, save_router
from ..runtime.opening import OpenedCheckpoint, open_headers
from .inputs import RecordedInputs
from .measuring import expert_output
from .quantise import Source
from .reading import ExpertReader
from .writing import calibration_of, expert_module

MOST_BYTES = 512 << 20
"""Of hidden states that gates are trained on, in bfloat16; with more experts each has fewer."""
MOST_ROWS = 512
"""Rows of an expert at most; not tuned."""
HELD_OUT = 10
"""One row in so many judges and does not train."""
EPOCHS, BATCH, RATE, DECAY = 60, 512, 0.02, 1e-3
"""Of AdamW, whose rate falls to zero by a cosine; not tuned."""


@dataclass(frozen=True, eq=False)
class LayerRows:
    """What the gate of one layer learns from.

    Args:
        x_ND: hidden states, bfloat16.
        expert_N: which expert each goes to.
        cost_NV: nats that each number of levels is expected to cost.
        stands_for_N: tokens of the text that each row stands for.
        bits_V: stored bits of a weight with each number of levels.
        num_experts: of the layer, 1 or more.
    """

    x_ND: torch.Tensor
    expert_N: torch.Tensor
    cost_NV: torch.Tensor
    stands_for_N: torch.Tensor
    bits_V: torch.Tensor
    num_experts: int

    def part(self, is_meant_N: torch.Tensor) -> "LayerRows":
        """Some of the rows."""
        fields = (each[is_meant_N] for each in (self.x_ND, self.expert_N, self.cost_NV, self.stands_for_N))
        return LayerRows(*fields, self.bits_V, self.num_experts)

    def spent(self, depth_N: torch.Tensor) -> tuple[float, float, float]:
        """Tokens, and bits and nats of all of them, if each row has so many levels (counted from 0)."""
        bits, cost = self.bits_V[depth_N], self.cost_NV.gather(1, depth_N[:, None])[:, 0]
        sums = (self.stands_for_N, self.stands_for_N * bits, self.stands_for_N * cost)
        tokens, all_bits, nats = (float(each.double().sum()) for each in sums)
        return tokens, all_bits, nats


@dataclass(frozen=True)
class RouterResult:
    """What came of training, on rows that were held out.

    Args:
        bits: mean stored bits of a weight, over tokens and their experts.
        cost: nats that are expected of each expert of a token.
        mixed_cost: the same without a router: levels drawn at random for the same bits, from the two that are nearest.
    """

    bits: float
    cost: float
    mixed_cost: float


def train_bit_router(
    path_or_id: str | Path,
    pack: Path,
    inputs: RecordedInputs,
    bits: float,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> RouterResult:
    """Train the router of a packed copy in levels, and write it beside the copy.

    Args:
        path_or_id: the model that was packed.
        pack: its copy in levels.
        inputs: of `calibrate(needs_sensitivity=True)`.
        bits: stored bits of a weight, the mean over tokens and their experts; those of one level to those of all.
        progress: told what is going on, how much of it is done, and how much there is.

    Raises:
        ValueError: if the copy has no levels, or not so few or many bits.
    """
    opened = open_headers(path_or_id, pack)
    layers = [layer for layer, form in enumerate(opened.forms) if isinstance(form, LevelledForm)]
    if not layers:
        raise ValueError(f"{pack}: has no levels to choose from; pack it with --form planes or residual")
    expect_bits(opened, bits)
    rows_L = _measure(path_or_id, opened, inputs, layers, progress)
    generator = torch.Generator().manual_seed(0)
    is_judge_L = [torch.arange(len(rows.expert_N)) % HELD_OUT == 0 for rows in rows_L]
    trained_L = [rows.part(~is_judge_N) for rows, is_judge_N in zip(rows_L, is_judge_L, strict=True)]
    gates = _train(trained_L, bits, generator, lambda done: progress("training the router", done, EPOCHS))
    gates = _within(gates, trained_L, bits)
    judged_L = [rows.part(is_judge_N) for rows, is_judge_N in zip(rows_L, is_judge_L, strict=True)]
    result = _judge(gates, judged_L)
    about = {"bits": f"{bits:g}", "held_out_bits": f"{result.bits:.4f}", "held_out_cost": f"{result.cost:.6g}"}
    save_router(pack, dict(zip(layers, gates, strict=True)), about)
    return result


def expect_bits(opened: OpenedCheckpoint, bits: float) -> None:
    """Refuse a budget outside of what levels offer.

    Raises:
        ValueError: if it is.
    """
    bits_LV = [_bits(form) for form in opened.forms if isinstance(form, LevelledForm)]
    least, most = (max(float(each[place]) for each in bits_LV) for place in (0, -1))
    if not least <= bits <= most:
        raise ValueError(f"the router's bits must lie between {least:.2f} and {most:.2f}, as stored; got {bits:g}")


def _bits(form: LevelledForm) -> torch.Tensor:
    """Stored bits of a weight with each number of levels."""
    weights = form.layer.plain_bytes / form.layer.parameters[0].dtype.itemsize
    return torch.tensor([8 * end / weights for end in form.level_ends])


def _measure(
    path_or_id: str | Path,
    opened: OpenedCheckpoint,
    inputs: RecordedInputs,
    layers: Sequence[int],
    progress: Callable[[str, int, int], None],
) -> list[LayerRows]:
    """The rows of each layer, one expert in memory at a time."""
    source = Source.opened(path_or_id)
    plain, stored = ExpertReader(source.model, source.forms), ExpertReader(opened.model, opened.forms)
    experts = sum(opened.forms[layer].layer.num_experts for layer in layers)
    width = max(inputs.about["width"])
    most = max(16, min(MOST_ROWS, MOST_BYTES // (2 * width * experts)))
    done, found = 0, []
    try:
        for layer in layers:
            rows = []
            for expert in range(opened.forms[layer].layer.num_experts):
                rows.append(_measured(source, plain, stored, inputs, layer, expert, most))
                done += 1
                progress("measuring levels", done, experts)
            found.append(_joined(rows, opened.forms[layer], float(inputs.about["sensitivity"][layer])))
    finally:
        plain.close()
        stored.close()
    return found


def _measured(
    source: Source,
    plain: ExpertReader,
    stored: ExpertReader,
    inputs: RecordedInputs,
    layer: int,
    expert: int,
    most: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]:
    """An expert's inputs, squared errors of its weighted outputs by levels, their squares, and tokens of each row."""
    about = expert_module(source.model, source.layers[layer])
    calibration = calibration_of(inputs, about, layer, expert, most)
    assert calibration is not None
    form, rows = stored.form(layer), calibration.rows
    with torch.no_grad():
        _, out_ND = expert_output(about, plain.matrices(layer, expert), calibration)
        levels, square_N = next(iter(stored.views(layer, expert).values())), rows.weight_N.square()
        errors = []
        for depth in range(1, len(levels) + 1):
            _, got_ND = expert_output(about, form.matrices(levels[:depth]), calibration)
            errors.append(square_N * (got_ND - out_ND).square().sum(-1))
        energy_N = square_N * out_ND.square().sum(-1)
    return rows.x_NC.bfloat16(), torch.stack(errors, 1), energy_N, rows.num_seen / max(len(rows.x_NC), 1)


def _joined(
    measured: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]], form: LevelledForm, sensitivity: float
) -> LayerRows:
    counts = torch.tensor([len(energy_N) for _, _, energy_N, _ in measured])
    expert_N = torch.repeat_interleave(torch.arange(len(measured)), counts)
    stands_for_N = torch.tensor([each[3] for each in measured]).repeat_interleave(counts)
    energy_N = torch.cat([each[2] for each in measured])
    # of a token's outputs, as if those of its experts were at right angles
    visits = float(stands_for_N.sum())
    energy = float((stands_for_N * energy_N).sum()) / max(visits, 1e-30)
    cost_NV = sensitivity * torch.cat([each[1] for each in measured]) / max(energy, 1e-30)
    return LayerRows(
        torch.cat([each[0] for each in measured]), expert_N, cost_NV, stands_for_N, _bits(form), len(measured)
    )


def _train(
    rows_L: Sequence[LayerRows], bits: float, generator: torch.Generator, progress: Callable[[int], None]
) -> list[BitGate]:
    """Gates that minimise expected cost and the price of expected bits."""
    price = _price(rows_L, bits)
    loss_L = [rows.cost_NV + price * rows.bits_V for rows in rows_L]
    loss_L = [loss_NV - loss_NV.amin(1, keepdim=True) for loss_NV in loss_L]
    scale = max(sum(float(loss_NV.mean()) for loss_NV in loss_L) / len(loss_L), 1e-30)
    size_L = [rows.x_ND.float().square().mean().sqrt().clamp_min(1e-12) for rows in rows_L]
    weight_L = [torch.zeros(len(rows.bits_V), rows.x_ND.shape[1], requires_grad=True) for rows in rows_L]
    bias_L = [torch.zeros(rows.num_experts, len(rows.bits_V), requires_grad=True) for rows in rows_L]
    optimiser = torch.optim.AdamW([*weight_L, *bias_L], lr=RATE, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, EPOCHS)
    for epoch in range(EPOCHS):
        for rows, size, loss_NV, weight_VD, bias_EV in zip(rows_L, size_L, loss_L, weight_L, bias_L, strict=True):
            for some_n in torch.randperm(len(rows.expert_N), generator=generator).split(BATCH):
                logits_nV = rows.x_ND[some_n].float() / size @ weight_VD.T + bias_EV[rows.expert_N[some_n]]
                expected_n = (logits_nV.softmax(-1) * loss_NV[some_n] / scale).sum(-1)
                stands_for_n = rows.stands_for_N[some_n]
                optimiser.zero_grad()
                ((stands_for_n * expected_n).sum() / stands_for_n.sum()).backward()
                optimiser.step()
        schedule.step()
        progress(epoch + 1)
    return [
        BitGate((weight / size).detach(), bias.detach())
        for weight, size, bias in zip(weight_L, size_L, bias_L, strict=True)
    ]


def _price(rows_L: Sequence[LayerRows], bits: float) -> float:
    """Nats that a bit of one row may cost: the least at which rows that knew their costs would keep the budget."""
    low, high = 0.0, max(float(rows.cost_NV.max() / rows.bits_V.diff().min()) for rows in rows_L)
    for _ in range(60):
        middle = (low + high) / 2
        depth_L = [(rows.cost_NV + middle * rows.bits_V).argmin(-1) for rows in rows_L]
        low, high = (middle, high) if _mean_bits(rows_L, depth_L) > bits else (low, middle)
    return high


def _mean_bits(rows_L: Sequence[LayerRows], depth_L: Sequence[torch.Tensor]) -> float:
    found = [rows.spent(depth_N) for rows, depth_N in zip(rows_L, depth_L, strict=True)]
    return sum(all_bits for _, all_bits, _ in found) / sum(tokens for tokens, _, _ in found)


def _within(gates: Sequence[BitGate], rows_L: Sequence[LayerRows], bits: float) -> list[BitGate]:
    """The gates, whose choices spend other bits than their chances, with the lowest price that keeps the budget."""
    logits_L = [gate.logits(rows.x_ND, rows.expert_N) for gate, rows in zip(gates, rows_L, strict=True)]

    def spent(price: float) -> float:
        pairs = zip(logits_L, rows_L, strict=True)
        return _mean_bits(rows_L, [(logits_NV - price * rows.bits_V).argmax(-1) for logits_NV, rows in pairs])

    low = -max(float(logits_NV.abs().max()) for logits_NV in logits_L) * 8 - 1
    high = -low
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if spent(middle) > bits else (low, middle)
    return [
        BitGate(gate.weight_VD, gate.bias_EV - high * rows.bits_V) for gate, rows in zip(gates, rows_L, strict=True)
    ]


def _judge(gates: Sequence[BitGate], rows_L: Sequence[LayerRows]) -> RouterResult:
    found = [
        rows.spent(gate.logits(rows.x_ND, rows.expert_N).argmax(-1)) for gate, rows in zip(gates, rows_L, strict=True)
    ]
    tokens, all_bits, nats = (sum(each[place] for each in found) for place in range(3))
    bits = all_bits / tokens
    return RouterResult(bits, nats / tokens, _mixed(rows_L, bits, tokens))


def _mixed(rows_L: Sequence[LayerRows], bits: float, tokens: float) -> float:
    """Cost of the same bits for all, on the line between the two numbers of levels that are nearest."""
    points = []
    for depth in range(len(rows_L[0].bits_V)):
        found = [rows.spent(torch.full_like(rows.expert_N, depth)) for rows in rows_L]
        points.append((sum(each[1] for each in found) / tokens, sum(each[2] for each in found) / tokens))
    for (fewer, dear), (more, cheap) in pairwise(points):
        if fewer <= bits <= more:
            return dear + (cheap - dear) * (bits - fewer) / (more - fewer)
    return points[0][1] if bits < points[0][0] else points[-1][1]

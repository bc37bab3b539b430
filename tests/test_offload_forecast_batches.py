"""Batches within a budget: steps of several sequences and a prompt as a brute-force cache has them, slots beside KV."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from experiments.evidence.generated import save_generated
from offload.cache.steps import replay_steps
from offload.cli import app
from offload.compute.kv_cache import room_positions
from offload.forecast.batches import best_batch, forecast_batches, lanes, step_rows
from offload.forecast.steps import StepRates, forecast_steps
from placement import generate_trace
from routing.ground.hardware import Hardware
from routing.traces import RoutingTrace
from tests.test_offload_forecast_variants import CONFIG, RATES

TOKEN_BYTES = 4 * 2 * 2 * 64 * 2  # layers, keys and values, heads, width, bfloat16


@pytest.fixture(autouse=True)
def _small_process(monkeypatch):
    """What earlier tests have left in this process is no part of a budget here."""
    monkeypatch.setattr("offload.runtime.opening.resident_bytes", lambda: 300 << 20)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("model")
    save_generated(place, CONFIG, shard_bytes=10**9)
    generate_trace(tokens=100, layers=4, experts=64, top_k=4, blocks=8, tokens_per_sequence=40).save(place / "t.npz")
    Hardware(**RATES).save(place / "h.toml")
    return place


def test_sequences_lie_side_by_side_and_prompts_behind_them():
    trace = SimpleNamespace(num_tokens=20)
    assert lanes(trace, 2).tolist() == [[step, 10 + step] for step in range(10)]
    # 20 rows are four steps of two sequences and three tokens: twelve rows of prompts, eight of sequences
    assert lanes(trace, 2, 3).tolist() == [[s, 4 + s, 8 + 3 * s, 9 + 3 * s, 10 + 3 * s] for s in range(4)]
    with pytest.raises(ValueError, match="two steps of 9 sequences and 2 tokens of a prompt need 22"):
        lanes(trace, 9, 2)


def least_recently_used(expert_ATK, slots):
    """Misses of each step: the step's distinct experts are asked for at once; who was asked for longest ago leaves."""
    resident, asked, misses = set(), {}, []
    for step, expert_TK in enumerate(expert_ATK.tolist()):
        needed = {expert for row in expert_TK for expert in row}
        for number, row in enumerate(expert_TK):
            for place, expert in enumerate(row):
                asked[expert] = (step, number, place)
        missing = needed - resident
        misses.append(len(missing))
        for expert in missing:
            if len(resident) == slots:
                resident.remove(min(resident - needed, key=asked.__getitem__))
            resident.add(expert)
    return misses


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), batch=st.integers(1, 4), chunk=st.integers(0, 3), slots=st.integers(14, 19))
def test_steps_of_sequences_and_a_prompt_equal_a_brute_force_cache(seed, batch, chunk, slots):
    draw = np.random.default_rng(seed)
    expert_TLK = np.argsort(draw.random((60, 1, 20)), axis=2)[:, :, :2]
    trace = RoutingTrace(
        expert_TLK=expert_TLK.astype(np.int16), sequence_T=np.zeros(60, np.int32), metadata={"num_experts": 20}
    )
    row_AT = lanes(trace, batch, chunk)
    found = replay_steps(trace, row_AT, [slots], "lru")
    assert found.misses_AL[:, 0].tolist() == least_recently_used(expert_TLK[row_AT, 0], slots)
    distinct = [len(np.unique(expert_TLK[row_T, 0])) for row_T in row_AT]
    assert (found.rows_ALE > 0).sum(axis=2)[:, 0].tolist() == distinct


def rates_for(batches, chunk=0):
    rows = step_rows(batches, chunk)
    return StepRates(Hardware(**RATES), {1: 1.0, 8: 1.5, 128: 8.0}, dict.fromkeys(rows, 1e-5))


def test_keys_and_values_take_slots_and_reads_are_shared(folder):
    trace, batches = RoutingTrace.load(folder / "t.npz"), [1, 16]
    found = forecast_batches(folder, trace, rates_for(batches), batches, context=8192, cpu_memory="2.5GiB")
    assert [one.kv_bytes for one in found] == [room_positions(batch * 8192) * TOKEN_BYTES for batch in batches]
    assert sum(found[0].num_slots) > sum(found[1].num_slots)
    for one in found:
        assert one.tokens_per_second == pytest.approx(one.batch / one.step_s)
        assert one.attention_s == pytest.approx(one.batch * 4096 * TOKEN_BYTES / RATES["memory_bytes_per_s"])
    assert best_batch(found).tokens_per_second == max(one.tokens_per_second for one in found)


@pytest.mark.slow
def test_a_batch_whose_keys_and_values_do_not_fit_says_what_would(folder):
    trace = RoutingTrace.load(folder / "t.npz")
    (refused,) = forecast_batches(folder, trace, rates_for([256]), [256], context=8192, cpu_memory="2.5GiB")
    assert not refused.num_slots
    assert "give at least" in refused.reason
    assert best_batch([refused]) is None


@pytest.mark.slow
def test_a_prompt_beside_decoding_makes_steps_longer(folder):
    trace = RoutingTrace.load(folder / "t.npz")
    alone, beside = (
        forecast_batches(folder, trace, rates_for([4], chunk), [4], context=256, chunk=chunk, cpu_memory="2.5GiB")[0]
        for chunk in (0, 16)
    )
    assert beside.step_s > alone.step_s
    assert beside.tokens_per_second < alone.tokens_per_second
    assert beside.kv_bytes == room_positions(5 * 256) * TOKEN_BYTES


def test_streamed_layers_bound_what_is_outside_experts_from_below(folder):
    """Layers that are read for each step take the disk's time, whatever their products take."""
    trace = RoutingTrace.load(folder / "t.npz")
    plan = SimpleNamespace(num_slots=(64,) * 4)
    shape = {"plan": plan, "forms": [SimpleNamespace(expert_bytes=1)] * 4, "dense_bytes": 1, "unread_bytes": 0}
    fitted = SimpleNamespace(**shape, streamed_bytes=10**9, kv_token_bytes=0)
    said = forecast_steps(fitted, trace, lanes(trace, 4), rates_for([4]), policy="lru", warm=20)
    assert said.step_s >= 10**9 / RATES["disk_bytes_per_s"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--batch", "1,x", "--trace", "t.npz", "--hardware", "h.toml"], "--batch takes whole numbers from 1 on"),
        (["--batch", "4"], "it needs --trace FILE"),
        (["--chunk", "8"], "--chunk needs --batch"),
    ],
)
def test_what_cannot_be_asked_is_refused(folder, options, words):
    placed = [str(folder / one) if Path(one).suffix in (".npz", ".toml") else one for one in options]
    done = CliRunner().invoke(app, ["fit", str(folder), *placed])
    assert words in str(done.exception)


@pytest.mark.slow
def test_the_command_names_the_best_batch(folder, tmp_path):
    options = ["--cpu-memory", "2.5GiB", "--context", "256", "--hardware", str(folder / "h.toml"), "--chunk", "8"]
    given = ["--trace", str(folder / "t.npz"), "--batch", "1,8", "--json", str(tmp_path / "f.json")]
    done = CliRunner().invoke(app, ["fit", str(folder), *options, *given])
    assert done.exit_code == 0, done.exception
    assert "most tokens per second" in done.output
    assert '"batches"' in (tmp_path / "f.json").read_text()

"""`bench serve` on a tiny replay checkpoint: every measure runs, and gives the numbers that its name says."""

import json

import numpy as np
import pytest

from experiments.bench.serving.clients import Answer
from experiments.evidence.replay import ReplaySize, build_replay
from routing.traces import RoutingTrace


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("replay")
    rng = np.random.default_rng(0)
    expert_TLK = np.stack([[rng.permutation(8)[:2] for _ in range(2)] for _ in range(300)]).astype(np.int16)
    trace = RoutingTrace(expert_TLK=expert_TLK, sequence_T=np.zeros(300, np.int32), metadata={"num_experts": 8})
    build_replay(trace, folder, ReplaySize(hidden=64, expert=32))
    return folder


def test_rates_of_one_and_of_several_users_with_the_same_bits(checkpoint, tmp_path, run):
    out = tmp_path / "rows.json"
    measure = ("--measure", "rates", "--users", "1", "--users", "3", "--new-tokens", "6", "--cache-experts", "3")
    assert run("bench", "serve", str(checkpoint), *measure, "--json", str(out)) == 0
    rows = json.loads(out.read_text())
    assert [(row["users"], row["schedule"]) for row in rows] == [
        (1, "turns"),
        *((3, one) for one in ("turns", "together", "auto")),
    ]
    assert all(row["same_bits"] and row["tok_per_s"] > 0 for row in rows)
    assert rows[2]["steps"] < rows[1]["steps"]


def test_a_second_turn_reads_less_and_a_full_queue_refuses(checkpoint, tmp_path, run):
    out = tmp_path / "rows.json"
    measure = ("--measure", "turn", "--measure", "overload", "--cache-experts", "3", "--prompt", "64")
    assert run("bench", "serve", str(checkpoint), *measure, "--json", str(out)) == 0
    turn, overload = json.loads(out.read_text())
    assert (turn["cold_cached_tokens"], turn["second_cached_tokens"]) == (0, 64 + 64 - 16 - 1)
    assert (overload["refused"], overload["completed"]) == (44, 20)


@pytest.mark.slow
def test_over_http_the_answer_is_that_of_generate(checkpoint, tmp_path, run):
    out = tmp_path / "rows.json"
    measure = ("--measure", "http", "--new-tokens", "6", "--cache-experts", "3")
    assert run("bench", "serve", str(checkpoint), *measure, "--json", str(out)) == 0
    generate, serve = json.loads(out.read_text())
    assert (generate["program"], serve["program"]) == ("generate", "serve")
    assert 0 < serve["first_token_over_s"] < serve["first_token_s"]


def test_an_unknown_measure_is_named(checkpoint, run, capsys):
    assert run("bench", "serve", str(checkpoint), "--measure", "speed") == 2
    assert "rates, llama.cpp, http, turn, prompt, overload, cancels" in capsys.readouterr().err.replace("\n", " ")


def test_gaps_are_between_tokens():
    answer = Answer(started_s=1.0, time_s=[1.5, 1.6, 2.6, 2.7])
    assert answer.first_s == 0.5
    assert answer.longest_gap_s == 1.0

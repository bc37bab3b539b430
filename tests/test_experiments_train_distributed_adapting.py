"""Degrees by time: each is tried, then the fastest is taken, for every bucket of rows; a log decides alike."""

import json

import pytest

from experiments.train.distributed.adapting import BUCKETS_PER_OCTAVE, TRIALS, Timings, bucket_of, facts, taken
from moe.parallel import Degree, degrees

CHOICES = degrees(4)
SECONDS = {4: 3.0, 2: 2.0, 1: 5.0}
"""Of a step by expert degree; halves take half a second less."""


def step(place, rows, seconds=None):
    degree = CHOICES[place]
    took = SECONDS[degree.expert] - 0.5 * (degree.parts - 1) if seconds is None else seconds
    return {"processes": 4} | facts(degree, rows, took)


def run(timings, rows_of_steps):
    places = []
    for rows in rows_of_steps:
        places.append(timings.choose())
        timings.note(step(places[-1], rows))
    return places


def test_four_processes_choose_from_all_divisors_and_from_halves_where_tokens_travel():
    assert [(one.expert, one.parts) for one in CHOICES] == [(4, 1), (4, 2), (2, 1), (2, 2), (1, 1)]
    assert degrees(1) == (Degree(expert=1),)
    assert [one.expert for one in degrees(6) if one.parts == 1] == [6, 3, 2, 1]


def test_every_degree_is_tried_in_turn_and_then_the_fastest_is_taken():
    tried = len(CHOICES) * TRIALS
    # the first step knows no rows, so its choice is counted with the rows that it then had
    places = run(Timings(CHOICES, processes=4), [1000] * (tried + 5))
    assert places[:tried] == list(range(len(CHOICES))) * TRIALS
    assert places[tried:] == [CHOICES.index(Degree(expert=2, parts=2))] * 5


def test_a_step_that_something_else_slowed_decides_nothing():
    timings = Timings(CHOICES, processes=4)
    for turn in range(TRIALS):
        for place in range(len(CHOICES)):
            timings.note(step(place, 1000, 60.0 if (turn, place) == (0, 3) else None))
    assert timings.choose() == 3


def test_what_becomes_slow_is_left():
    timings = Timings(CHOICES, processes=4)
    run(timings, [1000] * 40)
    assert timings.choose() == 3
    for _ in range(9):
        timings.note(step(3, 1000, 9.0))
    assert timings.choose() == 2


def test_other_rows_are_tried_anew_and_near_ones_are_not():
    timings = Timings(CHOICES, processes=4)
    run(timings, [1000] * 20)
    timings.note(step(3, 1030))
    assert timings.choose() == 3
    timings.note(step(3, 2000))
    assert timings.choose() == 0
    assert bucket_of(2000) - bucket_of(1000) == BUCKETS_PER_OCTAVE
    assert bucket_of(0) == 0


def test_a_log_decides_as_the_steps_did_and_other_numbers_of_processes_do_not_count():
    first, log = Timings(CHOICES, processes=4), []
    for _ in range(22):
        log.append(step(first.choose(), 1000))
        first.note(log[-1])
    others = [row | {"processes": 2, "step_s": 0.1} for row in log if row["expert_degree"] < 4]
    again = Timings(CHOICES, [{"processes": 4, "step": 1}, *log, *others], processes=4)
    assert first.choose() == again.choose() == 3
    assert Timings(CHOICES, others, processes=4).choose() == 0


def test_the_report_says_how_often_which_and_its_seconds(tmp_path):
    rows = [step(0, 1000, 1.0), step(0, 1000, 3.0), step(0, 1000, 2.0), step(4, 1000, 5.0), step(1, 4000, 0.25)]
    lines = [json.dumps({"step": number} | row) for number, row in enumerate(rows)]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, json.dumps({"step": 9, "loss": 1.0})]))
    assert [str(found) for found in taken(tmp_path)] == [
        "about 1024 rows: data=1,expert=4: 3 steps of 2.000 s",
        "about 1024 rows: data=4,expert=1: 1 steps of 5.000 s",
        "about 4096 rows: data=1,expert=4, woven in halves: 1 steps of 0.250 s",
    ]


@pytest.mark.parametrize("row", [{"processes": 4}, {"processes": 4, "loss": 1.0}])
def test_metrics_of_a_fixed_layout_count_for_nothing(row):
    assert Timings(CHOICES, [row], processes=4).choose() == 0

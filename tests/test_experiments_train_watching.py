"""What a person sees of a run: alerts, curves in the terminal, the page, TensorBoard's files."""

import io
import json
import re

import numpy as np
import pytest
from rich.console import Console

from experiments.train.metrics import read_log
from experiments.train.torch_run import train
from experiments.train.watching.alerts import WINDOW, Alarm, used_experts
from experiments.train.watching.live import BLANK, curve, picture
from experiments.train.watching.page import POINTS, curves, loads, write_run_page
from experiments.train.watching.watch import Watch


def row(load, step=1):
    return {"step": step, "load": load}


def test_used_experts_by_hand():
    assert used_experts(np.array([[0.25] * 4, [0.5, 0.5, 0, 0], [1, 0, 0, 0]])) == pytest.approx([4, 2, 1])
    assert used_experts(np.zeros((1, 4))) == pytest.approx([1])


def test_an_expert_that_nobody_visits_is_said_once_and_so_is_its_return():
    alarm, even, dead = Alarm({"num_experts_per_tok": 1}), [[0.25] * 4], [[0.4, 0.4, 0.2, 0.0]]
    assert [alarm.see(row(even)) for _ in range(WINDOW)] == [[]] * WINDOW
    said = [alarm.see(row(dead)) for _ in range(2 * WINDOW)]
    assert said.index([f"layer 0: no token in {WINDOW} steps for experts 3"]) == WINDOW - 1
    assert sum(map(len, said)) == 1
    assert alarm.see(row(even)) == ["layer 0: all experts are visited again"]


def test_a_router_that_collapses_is_said_and_one_that_visits_all_experts_cannot():
    narrow = [[0.125] * 8, [0.5, 0.49, *[0.01 / 6] * 6]]
    alarm = Alarm({"num_experts_per_tok": 2})
    said = [line for _ in range(WINDOW) for line in alarm.see(row(narrow))]
    assert said == ["layer 1: the router collapses, it uses 2.1 of 8 experts"]
    said = [line for _ in range(WINDOW) for line in alarm.see(row([[0.125] * 8] * 2))]
    assert said[0].startswith("layer 1: the router uses ")
    assert said[0].endswith(" of 8 experts again")
    for all_of_them in ([[1.0]], [[0.5, 0.5]]):
        alarm = Alarm({"num_experts_per_tok": 2})
        assert not any(alarm.see(row(all_of_them)) for _ in range(2 * WINDOW))
    assert Alarm({}).see({"step": 1}) == []


def test_a_curve_falls_from_its_upper_left_to_its_lower_right():
    lines = curve([3.0, 2.0, 1.0], width=4, height=2).split("\n")
    assert [len(line) for line in lines] == [4, 4]
    assert ord(lines[0][0]) > BLANK
    assert ord(lines[1][-1]) > BLANK
    assert ord(lines[0][-1]) == ord(lines[1][0]) == BLANK
    assert len(set(curve([1.0] * 9, width=4, height=1)) - {chr(BLANK)}) == 1


def test_the_page_holds_what_the_log_holds(tmp_path, corpus, tiny_training):
    run = tmp_path / "run"
    train(tiny_training, corpus, run, quiet=True, watch=Watch(page=True))
    page, rows = (run / "run.html").read_text(), read_log(run / "metrics.jsonl")
    data = json.loads(re.search(r"const data = (.*);\n", page)[1].replace("<\\/", "</"))
    lines = {line["name"]: line["points"] for drawn in data["curves"] for line in drawn["lines"]}
    assert lines["bits_per_byte"] == [[one["step"], one["bits_per_byte"]] for one in rows]
    assert [step for step, _ in lines["held_out_bits_per_byte"]] == [4, 8]
    assert data["loads"]["shares"][-1] == rows[-1]["load"]
    assert "8</b>steps, finished" in page
    assert "learning_rate: 0.001" in page
    assert page.count("</script>") == 1
    assert "http://www.w3.org/2000/svg" in page
    assert not re.search(r'(src|href)="', page), "it needs nothing else"

    (run / "run.yaml").write_text("data: </script><b>\n")
    (run / "judgement.json").write_text(
        json.dumps(
            {
                "domains": {"<i>": 1.5},
                "tasks": {"cloze": {"share": 0.5, "low": 0.4, "high": 0.6, "chance": 0.25, "trials": 9}},
            }
        )
    )
    page = write_run_page(run).read_text()
    assert page.count("</script>") == 1
    assert "&lt;i&gt;" in page
    picture_text = Console(width=90, record=True, file=io.StringIO())
    picture_text.print(picture([one | {"alerts": ["layer 0: trouble"]} for one in rows], 8))
    shown = picture_text.export_text()
    assert "step 8/8" in shown
    assert "layer 0: trouble" in shown


def test_long_runs_are_thinned_by_means_and_runs_without_routers_have_no_loads():
    rows = [{"step": n + 1, "bits_per_byte": float(n % 2)} for n in range(2 * POINTS)]
    (drawn,) = curves(rows)
    points = drawn["lines"][0]["points"]
    assert points[0] == (2, 0.5)
    assert len(points) == POINTS
    assert loads(rows) is None
    assert curves([]) == []


def test_event_files_hold_every_step(tmp_path, corpus, tiny_training):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tiny_training, corpus, tmp_path / "run", quiet=True, watch=Watch(event_files=True))
    found = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    found.Reload()
    rows = read_log(tmp_path / "run" / "metrics.jsonl")
    assert [one.value for one in found.Scalars("loss")] == pytest.approx([one["loss"] for one in rows])
    assert [one.step for one in found.Scalars("held_out_bits_per_byte")] == [4, 8]

"""Training on several processes: equal to one process, resumable on any number of them, refused where it cannot be."""

import json

import pytest
import torch

from experiments.train.checkpoint import CheckpointPlace, restore, save_checkpoint
from experiments.train.distributed.launch import shared_out
from experiments.train.distributed.run import keep_to_own_cores
from experiments.train.torch_run import build, train_step
from moe import MoEForCausalLM
from moe.parallel import Layout
from tests.rank_processes import run_ranks
from tests.split_ranks import CPU, cases, config_of, corpus_of

WITHOUT_BANKS = ("recursive-2", "mor-expert-2", "latent", "duo_llm", "feature_groups", "peer", "ultramem")


def one_process_run(folder):
    """Six steps of one process; the state after three in `folder`."""
    config = config_of(cases()["rmoe"])
    model, optimizer, order = build(config, corpus_of(), CPU)
    rows = []
    for step in range(6):
        if step == 3:
            place = CheckpointPlace(folder, config, corpus_of())
            save_checkpoint(place, 3, model, optimizer).rename(folder / "one")
        rows.append(train_step(model, optimizer, order, config, step))
    return [[row["loss"], row["gradient_norm"], row["max_vio"]] for row in rows]


def resumed_by_one_process(checkpoint):
    config = config_of(cases()["rmoe"])
    model, optimizer, order = build(config, corpus_of(), CPU)
    done = restore(checkpoint, model, optimizer)
    rows = [train_step(model, optimizer, order, config, step) for step in range(done, done + 3)]
    return [[row["loss"], row["gradient_norm"], row["max_vio"]] for row in rows]


def check_equalities(subtests, found):
    """Asserts all that processes found; returns what they refused, by name."""
    refused = {}
    for dtype, loss_limit, gradient_limit in (("float64", 1e-13, 1e-12), ("float32", 1e-6, 2e-6)):
        for name, one in found.get(dtype, {}).items():
            if isinstance(one, str):
                refused[name] = one
                continue
            with subtests.test(f"{name} in {dtype}"):
                assert one[0] <= loss_limit
                assert one[1] <= gradient_limit, one[2]
    for name, one in found.get("degrees", {}).items():
        with subtests.test(name):
            assert one[0] <= 1e-6
            assert one[1] <= 2e-6, one[2]
    for name, is_equal in found.get("states", {}).items():
        with subtests.test(f"routers of {name} are equal on all processes"):
            assert is_equal
    return refused


def check_losses(subtests, ours, **losses):
    """Asserts that runs went on as one process does: loss, gradient norm and imbalance of three steps."""
    for name, found in losses.items():
        with subtests.test(name):
            torch.testing.assert_close(torch.tensor(found), torch.tensor(ours[3:]), rtol=2e-6, atol=0)


@pytest.mark.parametrize(
    ("cores", "processes", "rank", "kept"),
    [({0, 1}, 2, 1, [[1]]), ({2, 3, 6, 7}, 2, 0, [[2, 3]]), ({0, 1, 2}, 2, 0, []), ({0, 1}, 4, 0, [])],
)
def test_a_process_keeps_to_its_cores_where_each_gets_as_many(monkeypatch, cores, processes, rank, kept):
    found = []
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: cores)
    monkeypatch.setattr("os.sched_setaffinity", lambda pid, chosen: found.append(chosen))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    keep_to_own_cores()
    assert found == kept


def test_two_processes_train_as_one_and_resume(tmp_path, subtests):
    ours = one_process_run(tmp_path)
    two = run_ranks(2, "split_ranks", "two", str(tmp_path))
    assert not check_equalities(subtests, two)
    with subtests.test("three micro-batches on two processes"):
        assert two["uneven"][1] <= 2e-6
    with subtests.test("experts are lent in forward and again in backward, and nothing keeps them"):
        layers, parameters = 2, 2
        assert two["lent"] == {"forward": [0, layers * parameters], "backward": [0, 2 * layers * parameters]}
    with subtests.test("the same number of processes resumes bit by bit"):
        assert two["saved"]["resumed"] == two["saved"]["after"]
    check_losses(
        subtests,
        ours,
        two=two["saved"]["after"],
        two_without_expert_parallelism_from_two=two["without expert parallelism"],
        two_from_one=two["from one process"],
        one_from_two=resumed_by_one_process(tmp_path / "two"),
    )
    with subtests.test("transformers opens the checkpoint"):
        assert MoEForCausalLM.from_pretrained(tmp_path / "two").config.router == "rmoe"
        settings = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("one", "two")]
        assert settings[0] == settings[1]


@pytest.mark.slow
def test_every_router_and_architecture_trains_on_two_processes_as_on_one_or_is_refused(tmp_path, subtests):
    refused = check_equalities(subtests, run_ranks(2, "split_ranks", "every", str(tmp_path)))
    assert refused.pop("mixture_of_transformers expert=2") == "expert=2 must divide the 3 experts of a layer"
    assert set(refused) == {f"{name} expert=2" for name in WITHOUT_BANKS}
    assert all("no bank of plain experts" in reason for reason in refused.values())


@pytest.mark.slow
def test_four_processes_train_as_one_and_resume_from_two_and_by_one(tmp_path, subtests):
    ours = one_process_run(tmp_path)
    run_ranks(2, "split_ranks", "two", str(tmp_path))
    four = run_ranks(4, "split_ranks", "four", str(tmp_path))
    assert not check_equalities(subtests, four)
    with subtests.test("a wrong divide factor is seen"):
        assert four["spoiled"][1] > 0.1
    with subtests.test("degrees that change between steps, and through a checkpoint, change no loss"):
        losses = (torch.tensor(four["changing"][name]) for name in ("changing", "alone"))
        torch.testing.assert_close(*losses, rtol=1e-6, atol=0)
    with subtests.test("four processes resume bit by bit"):
        assert four["saved"]["resumed"] == four["saved"]["after"]
    check_losses(
        subtests,
        ours,
        four_from_two=four["from two"],
        four=four["saved"]["after"],
        one_from_four=resumed_by_one_process(tmp_path / "four"),
    )


@pytest.mark.parametrize(
    ("text", "processes", "expected"),
    [
        (None, 2, Layout(data=2)),
        ("expert=2", 4, Layout(data=2, expert=2)),
        ("data=1,expert=4", 4, Layout(expert=4)),
        ("auto", 4, Layout(expert=4, by_time=True)),
        (" expert=1 ", 1, Layout()),
    ],
)
def test_a_layout_is_read_and_what_is_left_over_is_data(text, processes, expected):
    assert Layout.parse(text, processes) == expected


@pytest.mark.parametrize(
    ("text", "processes", "message"),
    [
        ("tensor=2", 2, "reads like data=2,expert=2"),
        ("expert=0", 2, "at least 1"),
        ("expert=3", 4, "are 3 processes, but there are 4"),
        ("data=2,expert=2", 2, "are 4 processes, but there are 2"),
        ("expert=2,expert=2", 4, "reads like"),
        ("expert", 4, "reads like"),
    ],
)
def test_a_layout_that_does_not_fit_is_refused(text, processes, message):
    with pytest.raises(ValueError, match=message):
        Layout.parse(text, processes)


def test_a_step_is_cut_into_micro_batches_for_all_processes():
    config = config_of(cases()["olmoe"], batch_size=8, accumulation=1)
    cut = shared_out(config, 4)
    assert (cut.batch_size, cut.accumulation) == (2, 4)
    assert shared_out(cut, 2) == cut
    assert shared_out(config, 1) == config
    with pytest.raises(ValueError, match="cannot share out the 8 sequences"):
        shared_out(config, 3)

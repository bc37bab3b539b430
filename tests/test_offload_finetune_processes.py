"""Forward-only fine-tuning over several processes: what one process does, bit by bit, whoever does which pass."""

import dataclasses
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import offload
from offload.finetune import tune as finetune
from offload.finetune.methods.forward_only import own_passes
from offload.finetune.run import read_log
from tests.small_tuning import LENGTH, save_examples, save_model

ROOT = Path(__file__).parents[1]
OPTIONS = offload.TuneOptions(
    method="zo", steps=4, sequence_length=LENGTH, accumulation=2, learning_rate=1e-3, checkpoint_every=2
)
pytestmark = pytest.mark.filterwarnings("ignore")


class ThreadPeers:
    """Peers that are threads of this process; what they share is what processes would send."""

    def __init__(self, number, count, barrier, board):
        self.number, self.count, self._barrier, self._board = number, count, barrier, board

    def gather(self, value):
        self._board[self.number] = pickle.dumps(value)
        self._barrier.wait()
        found = [pickle.loads(sent) for sent in self._board]
        self._barrier.wait()
        return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("processes")
    save_model(path / "model", torch.bfloat16, num_experts=16)
    save_examples(path / "data.jsonl")
    tune(path, "one", OPTIONS)
    return path


def tune(folder, name, options, **changes):
    changes = {"cache_experts": 2} | changes
    return offload.fine_tune(folder / "model", folder / "data.jsonl", folder / name, options, **changes)


def together(folder, name, options, **changes):
    """The same by threads in place of processes, none of which computes before all have opened their models.

    transformers opens a model by changing what the whole process has: the default dtype, initialisers.
    """
    count, opening, open_one = options.processes, threading.Lock(), finetune._open

    def open_alone(*given, **named):
        with opening:
            found = open_one(*given, **named)
        barrier.wait()
        return found

    barrier, board = threading.Barrier(count, timeout=60), [None] * count

    def one(number):
        try:
            tune(folder, name, options, peers=ThreadPeers(number, count, barrier, board), **changes)
        except BaseException:
            barrier.abort()
            raise

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(count) as threads:
        patch.setattr(finetune, "_open", open_alone)
        for done in [threads.submit(one, number) for number in range(count)]:
            done.result()


def assert_equal(found, expected):
    read = [
        {key: value for file in sorted(out.glob("*.safetensors")) for key, value in load_file(file).items()}
        for out in (found, expected)
    ]
    assert read[0].keys() == read[1].keys()
    assert all(torch.equal(value, read[1][key]) for key, value in read[0].items())


def test_passes_are_shared_out_by_hand():
    plus, minus = 0, 1
    two, four = (dataclasses.replace(OPTIONS, processes=count) for count in (2, 4))
    assert [own_passes(two, number) for number in (0, 1)] == [[(plus, 0), (minus, 0)], [(plus, 1), (minus, 1)]]
    assert [own_passes(four, number) for number in range(4)] == [[(plus, 0)], [(minus, 0)], [(plus, 1)], [(minus, 1)]]
    assert own_passes(OPTIONS, 0) == [(plus, 0), (plus, 1), (minus, 0), (minus, 1)]
    with pytest.raises(ValueError, match="3 processes cannot share out 4 passes"):
        dataclasses.replace(OPTIONS, processes=3)
    with pytest.raises(ValueError, match="full runs in one process"):
        dataclasses.replace(OPTIONS, method="full", processes=2)


@pytest.mark.parametrize("count", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_several_do_what_one_does(folder, count):
    options = dataclasses.replace(OPTIONS, processes=count)
    together(folder, f"first{count}", dataclasses.replace(options, steps=2))
    together(folder, f"first{count}", options, resume=True, cache_experts=5)
    assert_equal(folder / f"first{count}", folder / "one")
    logs = [read_log(folder / name / "metrics.jsonl") for name in ("one", f"first{count}")]
    for one, several in zip(*logs, strict=True):
        assert (one["loss"], one["load"]) == (several["loss"], several["load"])


def command(folder, out, *flags):
    arguments = ["finetune", folder / "model", "--data", folder / "data.jsonl", "--out", out, "--method", "zo"]
    arguments += ["--sequence-length", LENGTH, "--cache-experts", 2, "--learning-rate", 1e-3, "--checkpoint-every", 2]
    arguments += ["--accumulation", 2, "--processes", 2, *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    program = [sys.executable, "-W", "ignore", "-m", "experiments.cli", *map(str, arguments)]
    return subprocess.Popen(program, env=environment, stderr=subprocess.PIPE, text=True)


def children_of(process):
    return [int(text) for text in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


@pytest.mark.slow
def test_a_process_that_is_killed_ends_the_others_and_the_run_continues_bit_by_bit(folder):
    running = command(folder, folder / "killed", "--steps", 40)
    while running.poll() is None and not (folder / "killed" / "checkpoints" / "step_00000004").is_dir():
        time.sleep(0.01)
    os.kill(children_of(running)[-1], signal.SIGKILL)
    running.communicate(timeout=300)
    assert running.returncode != 0
    resumed = command(folder, folder / "killed", "--steps", 40, "--resume")
    said = resumed.communicate(timeout=600)[1]
    assert resumed.returncode == 0, said
    tune(folder, "forty", dataclasses.replace(OPTIONS, steps=40))
    assert_equal(folder / "killed", folder / "forty")


@pytest.mark.slow
def test_ctrl_c_commits_the_step_of_all_processes(folder):
    running = command(folder, folder / "interrupted", "--steps", 4000)
    while running.poll() is None and not (folder / "interrupted" / "checkpoints" / "step_00000002").is_dir():
        time.sleep(0.01)
    for process in (*children_of(running), running.pid):  # as the terminal does
        os.kill(process, signal.SIGINT)
    said = running.communicate(timeout=300)[1]
    assert running.returncode == 130, said
    done = read_log(folder / "interrupted" / "metrics.jsonl")[-1]["step"]
    assert [path.name for path in (folder / "interrupted" / "checkpoints").iterdir()] == [f"step_{done:08}"]

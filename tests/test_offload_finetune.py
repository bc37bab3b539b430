"""What all methods of fine-tuning share: examples, settings, passes that meet, records, the run's folder, `fit`."""

import json
import os
import signal
import threading
import time

import numpy as np
import pytest
import torch

import offload
from offload.finetune.examples import NO_LOSS, read_rows
from offload.finetune.forecast import TuneForecast, default_options, foresee
from offload.finetune.passing.lockstep import Lockstep
from offload.finetune.run import read_log
from offload.finetune.storage.records import ExpertRecords
from tests.small_tuning import LENGTH, save_examples, save_model

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tuning")
    save_model(path / "model", torch.bfloat16)
    save_examples(path / "data.jsonl")
    return path


def rows_of_lines(folder, tmp_path, *lines, length=24):
    file = tmp_path / "examples.jsonl"
    file.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return read_rows(file, folder / "model", 256, length)


def learnt(rows):
    """The text of each row whose tokens are learnt."""
    return [bytes(int(token) for token in row if token != NO_LOSS).decode() for row in rows.label_NS]


def test_only_answers_are_learnt(folder, tmp_path):
    rows = rows_of_lines(folder, tmp_path, {"prompt": "1+1=", "completion": "2"}, {"prompt": "2+2=", "completion": "4"})
    assert bytes(rows.token_NS[0].astype(np.uint8)) == b"1+1=2\x002+2=4\x00" + bytes(12)
    assert learnt(rows) == ["2\x004\x00"]


def test_conversations_learn_what_the_assistant_says(folder, tmp_path):
    turns = [("system", "be brief"), ("user", "a?"), ("assistant", "b"), ("user", "c?"), ("assistant", "d")]
    messages = [{"role": role, "content": content} for role, content in turns]
    rows = rows_of_lines(folder, tmp_path, {"messages": messages}, length=96)
    (found,) = learnt(rows)
    assert found == " b\n d\n"


def test_examples_are_packed_whole_where_they_fit(folder, tmp_path):
    rows = rows_of_lines(folder, tmp_path, *({"text": letter * 9} for letter in "abc"), {"text": "d" * 30}, length=24)
    texts = [bytes(row.astype(np.uint8)).rstrip(b"\0") for row in rows.token_NS]
    assert texts == [b"a" * 9 + b"\0" + b"b" * 9, b"c" * 9 + b"\0" + b"d" * 14, b"d" * 16]
    assert [text[:8] for text in learnt(rows)] == ["aaaaaaaa", "cccccccc", "dddddddd"]


def test_every_row_comes_once_per_epoch(folder):
    rows = read_rows(folder / "data.jsonl", folder / "model", 256, LENGTH)
    count = len(rows.token_NS)
    seen = [rows.batch(step, 0, 1, 1, seed=3)[0].numpy().tobytes() for step in range(2 * count)]
    assert sorted(seen[:count]) == sorted(seen[count:]) == sorted(row.tobytes() for row in rows.token_NS)
    assert seen[:count] != seen[count:]


WRONG_LINES = {
    "{": "line 1: not a JSON object",
    '{"question": "a"}': 'expected an object with "messages", "text", or "prompt" and "completion"',
    '{"messages": [{"role": "robot", "content": "a"}]}': 'each message needs a "role"',
    '{"messages": [{"role": "user", "content": "a"}]}': "nothing to learn",
}


@pytest.mark.parametrize("line", WRONG_LINES)
def test_wrong_examples_are_named(folder, tmp_path, line):
    with pytest.raises(ValueError, match=WRONG_LINES[line]):
        rows_of_lines(folder, tmp_path, line)


def test_wrong_settings_and_folders_are_refused(folder, tmp_path):
    for wrong in ({"method": "sgd"}, {"steps": 0}, {"beta1": 1.0}, {"epsilon": 0.0}, {"experts": "some"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            offload.TuneOptions(**({"method": "zo", "steps": 1} | wrong))
    options = offload.TuneOptions(method="zo", steps=1, sequence_length=LENGTH)
    with pytest.raises(ValueError, match="nothing to resume"):
        offload.fine_tune(folder / "model", folder / "data.jsonl", tmp_path / "new", options, resume=True)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    with pytest.raises(ValueError, match="not empty"):
        offload.fine_tune(folder / "model", folder / "data.jsonl", tmp_path / "full", options)


def test_a_run_is_not_continued_with_other_settings_or_examples(folder, tmp_path, run):
    flags = ("--data", folder / "data.jsonl", "--sequence-length", LENGTH, "--out", tmp_path / "out")
    flags += ("--cache-experts", 2, "--method", "zo", "--experts", "each")
    assert run("finetune", folder / "model", *flags, "--steps", 1, "--json", tmp_path / "report.json") == 0
    assert json.loads((tmp_path / "report.json").read_text())["last"]["step"] == 1
    assert run("finetune", folder / "model", *flags, "--steps", 1) == 2
    assert run("finetune", folder / "model", *flags, "--steps", 2, "--seed", 1, "--resume") == 2
    (tmp_path / "other.txt").write_text("another text to learn from, long enough")
    assert run("finetune", folder / "model", *flags, "--data", tmp_path / "other.txt", "--steps", 2, "--resume") == 2
    assert run("finetune", folder / "model", *flags, "--steps", 2, "--resume") == 0


def test_ctrl_c_commits_the_step_that_it_comes_in(folder, tmp_path, run, capsys):
    flags = ("--data", folder / "data.jsonl", "--sequence-length", LENGTH, "--out", tmp_path / "out")
    flags += ("--cache-experts", 2, "--method", "zo")

    def interrupt():
        while not (tmp_path / "out" / "metrics.jsonl").is_file() or not read_log(tmp_path / "out" / "metrics.jsonl"):
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGINT)

    presser = threading.Thread(target=interrupt)
    presser.start()
    assert run("finetune", folder / "model", *flags, "--steps", 1000) == 130
    presser.join()
    assert capsys.readouterr().err.splitlines()[-1] == "expertier: interrupted"
    done = read_log(tmp_path / "out" / "metrics.jsonl")[-1]["step"]
    assert [path.name for path in (tmp_path / "out" / "checkpoints").iterdir()] == [f"step_{done:08}"]
    assert run("finetune", folder / "model", *flags, "--steps", done + 1, "--resume") == 0
    assert [row["step"] for row in read_log(tmp_path / "out" / "metrics.jsonl")] == list(range(1, done + 2))


def test_passes_meet_in_order_and_errors_end_all_of_them():
    lockstep, order = Lockstep(3), []

    def one(number):
        for place in "ab":
            order.append((number, place))
            assert lockstep.ask(place, number) == number * 10
        return number

    def answer(place, numbers):
        order.append(place)
        return [number * 10 for number in numbers]

    assert lockstep.run([lambda number=number: one(number) for number in range(3)], answer) == [0, 1, 2]
    assert order == [*((n, "a") for n in range(3)), "a", *((n, "b") for n in range(3)), "b"]
    with pytest.raises(ZeroDivisionError):
        lockstep.run([lambda: one(0), lambda: 1 // 0], answer)
    with pytest.raises(RuntimeError, match="different experts modules"):
        lockstep.run([lambda: lockstep.ask("a", 0), lambda: lockstep.ask("b", 0)], answer)
    assert lockstep.run([lambda: one(1)], answer) == [1]
    lockstep.close()


def test_a_commit_stays_whole_whatever_is_written_after_it(tmp_path):
    records = ExpertRecords(tmp_path / "experts", [4 * 100])
    for expert in range(3):
        records.write(0, expert, [torch.full((100,), float(expert))], step=1)
    table = records.secure()
    records.commit()
    for step in (2, 3):
        records.write(0, 1, [torch.full((100,), 10.0 * step)], step)
    assert records.read(0, 1).view(torch.float32)[0] == 30
    again = ExpertRecords(tmp_path / "experts", [4 * 100])
    again.restore(table)
    assert [again.read(0, expert).view(torch.float32)[0].item() for expert in range(3)] == [0, 1, 2]
    assert again.place(0, 1).step == 1
    # the place of the lost write is free again, and the file does not grow
    size = (tmp_path / "experts" / "layer_000.bin").stat().st_size
    again.write(0, 2, [torch.zeros(100)], step=2)
    assert (tmp_path / "experts" / "layer_000.bin").stat().st_size == size == 4 * 4096
    with pytest.raises(ValueError, match="damaged"):
        again.restore({"0.9": [99, 1, "00"]})


def test_what_a_step_touches_and_moves_by_hand(folder):
    found = foresee(folder / "model", default_options("full", 32))
    # 8 experts, 2 per token: a step of one token touches 2, of very many all 8
    assert found.touched(1) == pytest.approx([2, 2])
    assert found.touched(10_000) == pytest.approx([8, 8])
    none_held = TuneForecast(**vars(found) | {"plan": None})
    weights = 3 * 64 * 64
    assert none_held.traffic(10_000) == pytest.approx((2 * 8 * weights * (2 + 2 + 14), 2 * 8 * weights * 14))
    lora = TuneForecast(**vars(none_held) | {"method": "lora"})
    assert lora.traffic(10_000) == pytest.approx((2 * 8 * weights * (2 + 2), 0))
    assert TuneForecast(**vars(none_held) | {"method": "zo"}).traffic(10_000) == pytest.approx((16 * weights * 2,) * 2)


def test_fit_says_what_fine_tuning_takes(folder, tmp_path, run, capsys):
    rates = tmp_path / "hardware.toml"
    names = ("disk", "cached", "memory", "exact", "fast")
    rates.write_text("".join(f"{name}_bytes_per_s = 1e9\n" for name in names) + "layer_s = 1e-5\n")
    flags = ("--context", 64, "--hardware", rates, "--json", tmp_path / "fit.json")
    assert run("fit", folder / "model", "--finetune", "full", *flags) == 0
    told = json.loads((tmp_path / "fit.json").read_text())
    assert told["binds"] in ("disk", "products")
    assert told["written_tb_per_day"] > 0
    assert "TB per day" in capsys.readouterr().out
    assert told["activation_shares"] == {"kept": 1, "spilled": 0, "recomputed": 0}
    assert run("fit", folder / "model", "--finetune", "lora", "--activation-memory", "100KiB", *flags) == 0
    shares = json.loads((tmp_path / "fit.json").read_text())["activation_shares"]
    assert sum(shares.values()) == 1
    assert shares["kept"] < 1
    assert "of activations of micro-batches in layers" in capsys.readouterr().out
    assert run("fit", folder / "model", "--activation-memory", "1GiB") == 2
    assert run("fit", folder / "model", "--finetune", "lora", "--cpu-memory", "100MiB") == 1
    assert run("fit", folder / "model", "--finetune", "sgd") == 2

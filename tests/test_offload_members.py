"""Whole models as experts: each member's own bits from one shared memory, whoever was there before."""

import itertools
import json
import signal
import threading

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

import offload
import offload.members.members as members_module
from offload.members.choosing import Chooser, NaiveBayes, Rules
from offload.members.file import read_members
from tests.test_offload_runtime_families import _small_config

IDS = torch.randint(3, 96, (1, 7), generator=torch.Generator().manual_seed(2))
FAMILIES = {"code": ("llama", 3), "poems": ("gemma2", 2), "sums": ("olmoe", 3)}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def logits(model):
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    """A file of three members of different families, and each one's resident logits."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    folder, expected = tmp_path_factory.mktemp("group"), {}
    for name, (model_type, depth) in FAMILIES.items():
        torch.manual_seed(len(name))
        config = _small_config(model_type, {"num_hidden_layers": depth, "vocab_size": 256})
        AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(folder / name)
        expected[name] = logits(AutoModelForCausalLM.from_pretrained(folder / name, dtype="auto").eval())
    (folder / "code.txt").write_text("def f(x): return x\nimport os\n\nwhile True: pass\n")
    (folder / "poems.txt").write_text("a song of the sea\nthe moon is a lamp\n")
    rows = [{"name": name, "model": name} for name in FAMILIES]
    rows[0] |= {"prompts": "code.txt", "labels": ["python"]}
    rows[1] |= {"prompts": "poems.txt"}
    rows[2] |= {"words": ["add", "Multiply"]}
    file = folder / "members.yaml"
    file.write_text(json.dumps({"members": rows, "default": "poems"}))  # JSON is YAML
    return file, expected


def squeezed(members, share):
    """The same members in a pool of a share of its size, at least the largest guest."""
    windows = [model.offload.runtime.window for model in members.models.values()]
    largest = max(guest.form.slot_bytes for window in windows for guest in window.plan.streamed)
    members.pool.num_blocks = max(int(share * members.pool.num_blocks), largest // 4096)
    return members


@pytest.mark.parametrize("share", [0.0, 0.4, 0.7, 1.0])
def test_every_member_has_its_own_bits_in_any_order(group, share):
    file, expected = group
    members = squeezed(offload.load_members(file, context=64), share)
    for name in ("code", "poems", "code", "code", "sums", "poems", "sums", "code"):
        members.choose("", name)
        assert torch.equal(logits(members.models[name]), expected[name])
        used = sorted((place.start, place.start + place.count) for place in members.pool.places.values())
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(used))
        assert not used or used[-1][1] <= members.pool.num_blocks
    report = members.report()
    assert report["code"]["popularity"] > report["sums"]["popularity"] > 0
    read = sum(row["bytes_read"] for row in report.values())
    once = sum(row["pass_bytes"] for row in report.values())
    assert (read < 1.2 * once) == (share == 1.0)
    members.close()


def test_a_member_that_stayed_reads_nothing_and_a_popular_one_stays(group):
    file, _ = group
    members = offload.load_members(file, context=64)
    layers = {name: model.offload.runtime.window for name, model in members.models.items()}
    for name in ("code", "code", "code", "poems"):
        members.choose("", name)
        logits(members.models[name])
    before = layers["code"].counters.bytes_read
    waited = layers["code"].counters.waited
    logits(members.models["code"])
    assert layers["code"].counters.bytes_read == before, "rows of the embedding stay, too"
    # a newcomer in a pool that is full: the unpopular member leaves whole before the popular one leaves from its end
    members.pool.num_blocks = sum(place.count for place in members.pool.places.values())
    members.choose("", "sums")
    logits(members.models["sums"])
    left = sorted(number for owner, number in members.pool.places if owner == 0)
    assert members.report()["poems"]["resident_layers"] == 0
    assert left == list(range(len(left))) != []
    assert waited <= layers["code"].counters.waited
    members.close()


def test_choosing_starts_to_read_before_the_pass(group):
    file, expected = group
    members = offload.load_members(file, context=64)
    chosen = members.choose("def g(): return 3")
    assert (chosen.name, chosen.why) == ("code", "learned")
    assert members.report()["code"]["resident_layers"] == 4
    assert torch.equal(logits(members.models["code"]), expected["code"])
    assert members.report()["code"]["bytes_read"] == members.report()["code"]["pass_bytes"] + 7 * 64 * 2
    members.close()


class Stop(BaseException):
    """What Ctrl-C raises."""


# as in test_offload_window.py: a callback of the collector may be what is interrupted
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_interrupts_while_switching(group):
    file, expected = group
    members, cut = squeezed(offload.load_members(file, context=64, io="cached"), 0.4), 0

    def stop(*_):
        raise Stop

    before = signal.signal(signal.SIGALRM, stop)
    for number, name in zip(range(24), itertools.cycle(FAMILIES), strict=False):
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.0003 + 0.0004 * (number % 12))
            members.choose("", name)
            logits(members.models[name])
        except Stop:
            cut += 1
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for each in FAMILIES:
            assert torch.equal(logits(members.models[each]), expected[each])
    signal.signal(signal.SIGALRM, before)
    assert cut > 2
    members.close()


@pytest.fixture(scope="module")
def bundled_group(tmp_path_factory):
    """A dense member and a mixture with ReLU by their hidden units, and one as it is, with their resident logits."""
    folder, expected, rows = tmp_path_factory.mktemp("bundled"), {}, []
    for name, (model_type, depth) in FAMILIES.items():
        torch.manual_seed(len(name))
        changes = {"num_hidden_layers": depth, "vocab_size": 256, "hidden_act": "relu"}
        AutoModelForCausalLM.from_config(_small_config(model_type, changes)).save_pretrained(folder / name)
        expected[name] = logits(AutoModelForCausalLM.from_pretrained(folder / name, dtype="auto").eval())
        rows.append({"name": name, "model": name})
        if name != "poems":
            offload.pack_units(folder / name, folder / f"{name}.units")
            rows[-1]["pack"] = f"{name}.units"
    file = folder / "members.yaml"
    file.write_text(json.dumps({"members": rows}))
    return file, expected


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_members_by_hidden_units_divide_the_room_with_the_pool(bundled_group, share, monkeypatch):
    file, expected = bundled_group
    everything = 3 << 20  # more than all layers and all units take
    monkeypatch.setattr(members_module, "room_besides", lambda *_: everything)
    whole = offload.load_members(file, context=64)
    layers = whole.pool.num_blocks * 4096
    units = {name: model.offload.runtime.units for name, model in whole.models.items()}
    assert units["poems"] is None
    nbytes = sum(each.bundle.nbytes for each in units.values() if each)
    least = max(one.offload.runtime.window.plan.ring_bytes for one in whole.models.values())
    assert layers + nbytes < everything
    assert all(each.report()["slots_per_layer"] == each.report()["units_per_layer"] for each in units.values() if each)
    names = whole.models["code"].offload.runtime.window.plan.names
    assert not [name for name in names if ".mlp." in name], "what is in the bundle is not streamed besides"
    whole.close()
    monkeypatch.setattr(members_module, "room_besides", lambda *_: max(int(share * (layers + nbytes)), least))
    members = offload.load_members(file, context=64)
    for name in ("code", "sums", "poems", "code", "sums"):
        members.choose("", name)
        torch.testing.assert_close(logits(members.models[name]), expected[name], rtol=1e-4, atol=1e-4)
    report = members.report()
    for name in ("code", "sums"):
        found = report[name]["units"]
        kept = sum(found["slots_per_layer"]) / sum(found["units_per_layer"])
        assert kept == pytest.approx(share, abs=0.05)
        assert found["bytes_read"] > 0
    assert "units" not in report["poems"]
    members.close()


def test_closing_gives_the_pool_back(group):
    members = offload.load_members(group[0], context=64)
    logits(members.models["code"])
    assert members.pool.memory.tensor.any()
    members.close()
    assert not members.pool.memory.tensor.any()  # what the system has taken back reads as zeros
    with pytest.raises(RuntimeError, match="this model was closed"):
        logits(members.models["code"])


def test_members_in_two_threads(group):
    file, expected = group
    members, found = offload.load_members(file, context=64), {}

    def compute(name):
        found[name] = [torch.equal(logits(members.models[name]), expected[name]) for _ in range(5)]

    threads = [threading.Thread(target=compute, args=(name,)) for name in FAMILIES]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {name: [True] * 5 for name in FAMILIES}
    members.close()


def test_a_budget_that_holds_no_layer_says_which_would_do(group):
    file, _ = group
    with pytest.raises(ValueError, match=r"too small for 3 members: their largest layer .* give at least"):
        offload.load_members(file, context=64, cpu_memory="100MiB")


def test_who_answers():
    rules = {
        "a": Rules(labels=("first",), words=("def",), prompts=("red green", "green blue")),
        "b": Rules(words=("verse",), prompts=("one two", "two three")),
    }
    chooser = Chooser(rules, "b")
    found = [chooser.choose(prompt).name for prompt in ("a DEF here", "verse", "def verse two", "blue", "???")]
    assert found == ["a", "b", "b", "a", "b"]
    assert chooser.choose("verse", "first").name == "a"
    with pytest.raises(ValueError, match="third"):
        chooser.choose("", "third")
    # counts of red: 1 of 4 and 0 of 4; six known words, half a count each
    shares = NaiveBayes({name: rule.prompts for name, rule in rules.items()}).shares("red")
    assert shares["a"] == pytest.approx(1.5 / 7 / (1.5 / 7 + 0.5 / 7))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("members: []", "members: List should have at least 1"),
        ("- a", "expected `members:`"),
        ("members: [{name: a}]", r"members\.0\.model"),
        ("members: [{name: a, model: m, size: 3}]", "size"),
        ("members: [{name: a/b, model: m}]", r"members\.0\.name"),
        ("members: [{name: a, model: m}, {name: b, model: m, labels: [a]}]", "'a' names two members"),
        ("members: [{name: a, model: m}]\ndefault: c", "default member"),
        ("members: [{name: a, model: !!python/object:os.system x}]", "no YAML"),
        ("members: [{name: a, model: m}]\nfolder: /etc", "expected `members:`"),
    ],
)
def test_what_the_file_may_not_say(tmp_path, text, words):
    file = tmp_path / "members.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=words):
        read_members(file)


def test_the_command_answers_by_the_member_that_the_prompt_chooses(group, run, tmp_path, capsys):
    file, _ = group
    report = tmp_path / "report.json"
    asked = ["generate", "--members", str(file), "--context", "64", "--max-new-tokens", "3"]
    assert run(*asked, "--prompt", "please multiply", "--json", str(report)) == 0
    found = json.loads(report.read_text())
    assert (found["member"], found["why"]) == ("sums", "words")
    assert found["members"]["sums"]["entered"] > 0
    assert found["members"]["code"]["bytes_read"] == 0
    assert run(*asked, "--prompt", "a", "--member", "nobody") == 2
    assert run(*asked, "--prompt", "a", "--cache-experts", "2") == 2
    assert run("generate", "--prompt", "a") == 2
    assert "give a MODEL, or --members FILE" in " ".join(capsys.readouterr().err.split())

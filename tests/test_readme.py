"""The README's commands, run as a reader would; and that the pages say what is there."""

import ast
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

import offload
from tests.test_offload_runtime_families import _families

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

# each command gets a process of its own, and so does the program; what they all import is there before they part
RUN = """
import os, sys, json
import moe, offload.cli
from experiments.cli import main
from transformers import AutoModelForCausalLM

def command(arguments):
    os.dup2(1, 2)
    sys.argv = ["expertier", *arguments]
    main()

def apart(said, work, *arguments):
    print("$", said, flush=True)
    child = os.fork()
    if not child:
        work(*arguments)
        sys.exit()
    if status := os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
        sys.exit(f"{said} {arguments} ended with {status}")

commands, program = json.loads(sys.argv[1])
for arguments in commands:
    apart(f"expertier {arguments[0]}", command, arguments)
apart("python", exec, compile(program, "README.md", "exec"), {"__name__": "__main__"})
"""


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    """What every printed command and the program printed, one after the other in an empty folder."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "runs").mkdir()
    (yaml,) = blocks("yaml")
    (folder / "cluster.yaml").write_text(yaml)
    commands = [line[2:] for block in blocks("console") for line in block.splitlines() if line.startswith("$ ")]
    assert len(commands) >= 8
    arguments = [shlex.split(command) for command in commands]
    assert {program for program, *_ in arguments} == {"expertier"}
    (program,) = blocks("python")
    return subprocess.run(
        [sys.executable, "-c", RUN, json.dumps([[rest for _, *rest in arguments], program])],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "160"},
        capture_output=True,
        text=True,
    )


def test_every_command_of_the_readme_works_as_printed(reader):
    assert reader.returncode == 0, f"{reader.stdout}\n{reader.stderr}"
    _, printed = reader.stdout.split("$ python\n")
    assert printed.startswith("import ")
    assert re.search(r"^hit rate 0\.\d{3}$", printed, re.MULTILINE)


def form(line):
    """A printed line without its numbers, and without the lines of a table."""
    line = re.sub(r"[┏┓┗┛┡┩└┘━─┳┻╇┴┃│]+", " ", line)
    line = re.sub(r"[KMGT]iB", "iB", re.sub(r"bound \([^)]+\)", "bound (#)", line))
    return " ".join(re.sub(r"(?<![\w-])-?(?:\d[\d.,]*(?:e-?\d+)?%?|-)(?![\w-])", "#", line).split())


def test_what_the_readme_prints_has_the_form_of_what_comes(reader):
    real = {form(line) for line in reader.stdout.replace("\r", "\n").splitlines()}
    generated = re.search(r"--trace routing.npz\n(.*?)\n(?=[\d.]+ tok/s)", README, re.DOTALL)
    for block in blocks("console"):
        for line in block.replace(generated.group(1), "").splitlines():
            if not line.startswith("$ ") and form(line):
                assert form(line) in real, line


def test_the_example_shows_something(reader):
    """Words rather than spaces, and caches that differ: what the README says one can see."""
    text = re.search(r"^\$ expertier generate\n(.*?)^[\d.]+ tok/s", reader.stdout, re.DOTALL | re.MULTILINE).group(1)
    assert len(re.findall(r"[a-z]{2,}", text)) >= 3, text
    rates = dict(re.findall(r"│ (lru|belady) +│ (0\.\d+) ", reader.stdout))
    assert float(rates["lru"]) < float(rates["belady"]) - 0.01, rates


def anchors(page):
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", page, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings_that_exist(page):
    text = re.sub(r"`[^`\n]+`", "", page.read_text(encoding="utf-8"))
    for name, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)", text):
        target = (page.parent / name) if name else page
        assert target.exists(), f"{page.name} links to {name}"
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), f"{page.name} links to {name}#{anchor}"


def file_map():
    spec = importlib.util.spec_from_file_location("file_map", ROOT / "docs" / "file_map.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_list_of_files_is_complete_and_up_to_date():
    printed = subprocess.run([sys.executable, "docs/file_map.py"], cwd=ROOT, capture_output=True, text=True, check=True)
    listed = (ROOT / "docs" / "files.md").read_text(encoding="utf-8")
    assert listed == printed.stdout, "run `make files`"


def test_the_rooms_of_the_page_are_those_of_the_floors():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert page == file_map().with_rooms(page), "run `make files`"
    for package in ("routing", "moe", "offload", "placement", "experiments"):
        for room in (path.parent for path in (ROOT / package).glob("*/__init__.py")):
            assert f"](../{package}/{room.name}) |" in page


def test_every_file_says_what_it_is():
    listed = (ROOT / "docs" / "files.md").read_text(encoding="utf-8")
    assert "|  |" not in listed


def test_the_ten_nouns_stand_where_the_page_says():
    page = (ROOT / "docs" / "start_here.md").read_text(encoding="utf-8")
    places = re.findall(r"^ +(\d+)  .*?((?:offload/[\w/.]+(?:, )?)+|transformers)$", page, re.MULTILINE)
    assert [int(number) for number, _ in places] == list(range(1, 11))
    for _, rooms in places[:-1]:
        for room in rooms.split(", "):
            assert (ROOT / room).exists(), room


SIZES = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "num_experts": 4, "num_experts_per_tok": 2,
    "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip


def changes(model, plain):
    """What an offloaded model has that the same model of transformers has not, as words of the page's table."""
    found = set()
    for name, module in model.named_modules():
        other = plain.get_submodule(name)
        fresh = module.__dict__.keys() - other.__dict__.keys() - {"_is_hf_initialized"}
        found |= {"forward of a norm" if "orm" in type(module).__name__ and key == "forward" else key for key in fresh}
        found |= {f"{key} deleted" for key in other._parameters.keys() - module._parameters.keys()}
        found |= {type(value).__name__ for value in module._parameters.values()} - {"Parameter", "NoneType"}
        found |= {"hooks"} if module._forward_hooks or module._forward_pre_hooks else set()
    learns = any(parameter.requires_grad for parameter in model.parameters())
    return found | (set() if learns else {"requires_grad"})


def test_the_page_names_everything_that_load_changes_on_a_model(tmp_path):
    config = transformers.Qwen3MoeConfig(**SIZES, dtype="bfloat16")
    transformers.AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(tmp_path)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    model = offload.load(tmp_path, cache_experts=2)
    found, keys = changes(model, plain), model.offload.report().keys()
    model.offload.close()
    report = (ROOT / "docs" / "offload.md").read_text(encoding="utf-8").split("## The report")[1].split("\n## ")[0]
    assert [key for key in keys if f"`{key}`" not in report] == []
    page = (ROOT / "docs" / "start_here.md").read_text(encoding="utf-8")
    table = page.split("## What `offload.load` changes on a model")[1].split("\n## ")[0]
    said = {
        "offload": "`model.offload`", "save_pretrained": "`save_pretrained` and `state_dict` raise",
        "state_dict": "`save_pretrained` and `state_dict` raise", "num_parameters": "`num_parameters` counts",
        "_apply": "`_apply` refuses", "set_experts_implementation": "`set_experts_implementation` refuses",
        "expert_shapes": "`expert_shapes`", "hooks": "three forward hooks",
        "requires_grad": "`requires_grad` is off", "_expertier_place": "`_expertier_place`",
        "forward": "linear layers in", "forward of a norm": "root-mean-square norms", "TokenWeight": "`TokenWeight`",
        "gate_up_proj deleted": "`gate_up_proj` (or `up_proj`) and `down_proj` are deleted",
        "down_proj deleted": "`gate_up_proj` (or `up_proj`) and `down_proj` are deleted",
    }  # fmt: skip
    assert found <= said.keys(), f"not on the page: {sorted(found - said.keys())}"
    assert {"offload", "save_pretrained", "hooks", "requires_grad", "_expertier_place", "down_proj deleted"} <= found
    assert all(said[change] in table for change in found)
    with pytest.raises(ValueError, match="no expert weights to save"):
        model.save_pretrained(tmp_path / "copy")
    assert model.config._experts_implementation == "expertier_offload"
    assert torch.is_tensor(model.lm_head.weight)


def test_the_quick_start_of_offloading_runs_as_printed(tmp_path, monkeypatch, run, capsys):
    config = transformers.Qwen3MoeConfig(**SIZES, dtype="bfloat16")
    transformers.AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(tmp_path / "MODEL")
    words = {word: place for place, word in enumerate(["[UNK]", "Once", "upon", "a", "time"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path / "MODEL")
    page = (ROOT / "docs" / "offload.md").read_text(encoding="utf-8").split("## Quick start")[1].split("\n## ")[0]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    for command in re.findall(r"^    expertier (fit|generate)(.*)$", page, re.MULTILINE):
        assert run(command[0], *shlex.split(command[1])) == 0
    closing = capsys.readouterr().err.strip().splitlines()[-2:]
    (printed,) = re.findall(r"^    (.* tok/s, .*)\n    (.*)$", page, re.MULTILINE)
    assert [*map(form, closing)] == [*map(form, printed)]
    (program,) = re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    exec(compile(program, "docs/offload.md", "exec"), {})
    assert capsys.readouterr().out.startswith("Once upon a time")


def test_the_number_of_families_is_the_one_that_is_tested():
    if not transformers.__version__.startswith("5.23."):
        pytest.skip("the pages speak of transformers 5.23")
    for name in ("README.md", "docs/offload.md"):
        assert f"{len(_families())} causal language models" in (ROOT / name).read_text(encoding="utf-8"), name


def test_no_package_is_called_like_the_program():
    assert importlib.util.find_spec("expertier") is None
    names = re.search(r"In Python, import (.*?)\.$", README, re.MULTILINE).group(1)
    assert set(re.findall(r"`(\w+)`", names)) == {
        path.parent.name for path in ROOT.glob("*/__init__.py") if ast.get_docstring(ast.parse(path.read_text()))
    }

"""Every measured figure of the README and of docs/ is the one in the record that it comes from; none is without.

How markers are written and what counts as a measured figure stands in tests/measured_figures.py.
"""

import json
import re
from pathlib import Path

import pytest

from experiments.evidence.record import save_record
from tests.measured_figures import MARKER, RECORDS, faults, measured, resolve, rows_of

ROOT = Path(__file__).parent.parent
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md") if path.name != "files.md")
PAGES = ["README.md", *PAGES]
FOLDERS = sorted(path for path in RECORDS.iterdir() if path.is_dir())

# What has such a form and was not measured here, word for word, with the reason.
EXEMPT: dict[str, dict[str, str]] = {
    "docs/offload.md": {
        "takes 90 % of what the machine": "a setting",
        "is 90 % of what is free": "a setting",
        "bits instead of 16": "the width of a bfloat16 number",
        "13.66 GB": "the size of a checkpoint",
    },
    "docs/checkpoints.md": {
        "4 and 8 bits": "the width of codes",
    },
    "docs/distributed.md": {
        "stays within 1.5 % of the floor": "the tolerance of a test",
        "takes 0.2 to 5 times as long": "constants of the command",
        "at\n  most 30 seconds": "a default of torchrun and of --grace",
    },
    "docs/kernels.md": {
        "| qwen3-30b-a3b, T >= 16384, forward | 480 TFLOP/s": "a goal, marked as unmeasured",
        "| the same, forward and backward | 400 TFLOP/s": "a goal, marked as unmeasured",
        "| mixtral-8x7b, T >= 16384, forward | 550 TFLOP/s": "a goal, marked as unmeasured",
        "| fine-grained-7b, T >= 16384, forward | 330 TFLOP/s": "a goal, marked as unmeasured",
        "80 % of copy bandwidth": "a goal, marked as unmeasured",
        "85 % of copy bandwidth": "a goal, marked as unmeasured",
        "2.5 times": "a goal, marked as unmeasured",
        "788 TFLOP/s": "a data sheet, in a section that says it is an estimate",
        "for 22 us": "computed, in a section that says it is an estimate",
        "for 8 us": "computed, in a section that says it is an estimate",
        "some 3 us": "in a section that says it is an estimate",
        "loop at 85 %": "an assumption, in a section that says it is an estimate",
        "about 500 TFLOP/s": "computed, in a section that says it is an estimate",
        "405 -> 477 TFLOP/s": "of SGLang, named there",
    },
    "docs/placement.md": {
        "45 % is not reached": "a goal",
        "below 1 MB or 1 MB/s": "a setting",
        "gap is above 1 %": "a setting",
    },
    "docs/training.md": {
        **dict.fromkeys(("0.003 cosine", "0.001 cosine", "0.0006 wsd"), "a preset's learning rate"),
        "About 5 %": "a setting",
        "95 % interval": "a definition",
        "on one side of 0 ": "a definition",
        "the interval holds 0,": "a definition",
        "no shape reaches within 5 %": "a setting",
        "Schuirmann's, at 5 %": "a setting",
        "chance is 0.25": "one of four",
        "minus 1; 0 is balanced": "a definition",
        "not exactly 0": "a definition",
        "1 = exact prefetch": "a definition",
        "window of 16 tokens": "a definition",
        "LRU 25 %": "a definition",
    },
    "docs/finetune.md": {
        "3.9 to 4.0 GB of host memory instead of 24.7 to 25.8 GB; steps 1.24 to 1.71 times as long": "its repository",
        "530 tokens/s in 6.1 GB; Hugging Face 304 in 32 GB": "of its documentation",
        "| 40 tokens/s |": "of its documentation",
        "1.96 times ZeRO-Infinity": "of GreedySnake's paper, named there",
        "moments in 8 bits": "the width of a number",
    },
    "docs/locality.md": {
        "0.2 times the range": "a setting",
        "95 % interval": "a definition",
        "at 12.5, 25 and 50 % of the experts": "a definition",
        "at 12.5 and 25 %": "a definition",
        "keeps 72 to 82 % of": "of temporal-moe, named there",
        "reports 26 % more reuse and 15.7 % more": "of ReMoE, named there",
        "at 25 % of the slots": "a definition",
    },
    "docs/lowbit.md": {
        **dict.fromkeys(("2 to 8 bits", "2 and 3 bits", "2, 3, 4 and 8 bits", "2, 3 or 4 bits"), "the width of codes"),
        "b + 0.375; b + 0.5 with fewer than 4 bits": "counted from the format",
        "2 bits with a zero": "the width of codes",
        "0.5 % of the tokens": "a setting",
        "95 % interval": "a definition",
    },
    "docs/routers.md": {
        "5 % expert dropout": "a setting",
        "0.00094 with": "the value of the formula before it",
        "for the target 2.0": "a setting",
        "up to 28 %": "of AdaMoE's paper, named there",
    },
}
# Tables that another test compares with their record as a whole, by the beginning of their header.
CHECKED_AS_A_WHOLE = {"docs/kernels.md": "| kernel | sm90"}


@pytest.mark.parametrize("name", PAGES)
def test_every_measured_figure_is_the_one_in_its_record(name):
    page = (ROOT / name).read_text(encoding="utf-8")
    assert faults(page, EXEMPT.get(name, {}), CHECKED_AS_A_WHOLE.get(name)) == []


@pytest.mark.parametrize("name", EXEMPT)
def test_every_exemption_is_still_needed(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert [phrase for phrase in EXEMPT[name] if phrase not in text] == []


def test_the_table_of_compiled_kernels_is_that_of_its_record():
    page = (ROOT / "docs/kernels.md").read_text(encoding="utf-8")
    (table,) = re.findall(r"^\| kernel \| sm90.*?(?=\n\n)", page, re.DOTALL | re.MULTILINE)
    header, _, *lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    rows = [row for row in rows_of("2026-11-21_kernels-ahead-of-time") if row["triton"] == "3.9.0"]
    assert {row["kernel"] for row in rows} == {f"{line[0].strip('`')}_kernel" for line in lines}
    for name, *cells in lines:
        for arch, cell in zip(header[1:], cells, strict=True):
            here = [row for row in rows if row["kernel"] == f"{name.strip('`')}_kernel" and row["arch"] == arch]
            registers, shared = (max(int(row[key]) for row in here) for key in ("registers", "shared_bytes"))
            assert cell.split(", ")[:2] == [str(registers), f"{shared / 1024:.3g}"], (name, arch)


PLAIN = "2026-11-21_offload-compressed tok_per_s[run=4, limit=12GiB, contestant=ours]"
PAGE = f"""It decodes 7.5<!--@a--> tokens per second.

<!-- figures
a = {PLAIN}
-->
"""


def test_a_right_figure_passes():
    assert faults(PAGE) == []


@pytest.mark.parametrize(
    ("changed", "fault"),
    [
        (("7.5", "7.4"), f"line 1: 7.4 is 7.472 in {PLAIN}"),
        (("7.5", "7.6"), f"line 1: 7.6 is 7.472 in {PLAIN}"),
        (("7.5<!--@a-->", "7.5"), "line 1: 7.5 is a measured figure without a marker"),
        (("@a", "@b"), "line 1: 7.5 has the marker b, which the block at the end does not explain"),
        (("offload-compressed", "offload-folded"), "line 1: 7.5: there is no record 2026-11-21_offload-folded"),
        (
            ("12GiB", "13GiB"),
            "line 1: 7.5: 2026-11-21_offload-compressed/result.csv has no tok_per_s[run=4, limit=13GiB",
        ),
        (("run=4", "run=*"), "line 1: 7.5 is"),
        (("run=4, limit=12GiB", "limit=6GiB"), "line 1: 7.5: 2026-11-21_offload-compressed/result.csv has 4 values of"),
        (("a = ", "c = 2026-11-21_offload-speed 1\na = "), "c stands behind no figure"),
    ],
)
def test_a_wrong_figure_and_a_wrong_marker_are_seen(changed, fault):
    page = PAGE.replace(*changed)
    if "run=*" in changed:
        page = page.replace("limit=12GiB", "limit=8GiB")
    assert any(found.startswith(fault) for found in faults(page)), faults(page)


def test_arithmetic_and_summaries_of_a_record():
    record = "2026-11-21_offload-compressed"
    assert resolve(f"{record} least tok_per_s[run=2, limit=6GiB, contestant=ours]") == pytest.approx(3.3960459849)
    assert resolve(f"{record} count tok_per_s[run=2, limit=6GiB, contestant=ours]") == 2
    assert resolve(f"{record} record.json:config.prefill * 2 - 8 / 10") == pytest.approx(12.0)
    ours, plain = (f"tok_per_s[run=4, limit=8GiB, contestant={name}]" for name in ("ours-compressed", "ours"))
    assert resolve(f"{record} {ours} / {plain}") == pytest.approx(8.671186 / 5.198935, abs=1e-6)


@pytest.mark.parametrize(
    ("text", "figures"),
    [
        ("It reads 1.1 to 1.7 GB/s here.", ["1.1", "1.7"]),
        ("It is 2 to 14 % quicker, in 4 of 5 runs.", ["2", "14"]),
        ("A hit rate of 0.7264 at 8 slots of 32.", ["0.7264"]),
        ("It takes **2.5** times as long.", ["2.5"]),
        ("Version 2.13, arXiv:2504.11651, T = 16, `1.5 ms`, a 6 GiB budget, 24 layers.", []),
        ("| slots | hit rate |\n|---|---|\n| 8 | 0.7 |\n", ["0.7"]),
        ("Tokens per second, that is tok/s:\n\n| limit | ours | theirs |\n|---|---|---|\n| 8 | 7 | 5 |\n", ["7", "5"]),
        ("See [it](../experiments/records/x/README.md): classic 0.66, RMoE 1.33 at K = 8.", ["0.66", "1.33"]),
        ("    expertier fit --hit-rate 0.805\n", []),
        ("A tile of 128 x 64 is 15.5x as fast as 3 x imbalance.", ["15.5"]),
        ("| key | default | tok/s |\n|---|---|---|\n| nic | 50 GB/s | 3 |\n", ["3"]),
    ],
)
def test_what_counts_as_a_measured_figure(text, figures):
    assert [figure.text for figure in measured(text)] == figures


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_every_record_is_whole(folder):
    facts = json.loads((folder / "record.json").read_text(encoding="utf-8"))
    assert facts.keys() >= {"command", "config", "seed", "date", "commit", "dirty", "versions", "device"}
    assert facts["command"]
    assert folder.name.startswith(f"{facts['date']}_")
    assert re.fullmatch(r"[0-9a-f]{40}", facts["commit"])
    assert facts["versions"]["python"]
    assert facts["device"]["cpu"]
    rows = rows_of(folder.name)
    assert rows
    assert all(None not in row and None not in row.values() for row in rows), "a line has too many or too few columns"
    readme = (folder / "README.md").read_text(encoding="utf-8")
    assert readme.startswith("# ")
    assert all(f"**{part}" in readme for part in ("Question.", "Result", "Conclusion.")), (
        "say question, result, conclusion"
    )


def test_a_record_is_written_whole_or_not_at_all(tmp_path):
    folder = save_record("a-question", [{"case": "one", "ms": 1.5}], config={"size": 2}, seed=3, folder=tmp_path)
    assert (folder / "result.csv").read_text(encoding="utf-8") == "case,ms\none,1.5\n"
    facts = json.loads((folder / "record.json").read_text(encoding="utf-8"))
    assert (facts["config"], facts["seed"]) == ({"size": 2}, 3)
    with pytest.raises(ValueError, match="expected at least one row"):
        save_record("nothing", [], config={}, folder=tmp_path)
    with pytest.raises(ValueError, match="other"):
        save_record("a-question", [{"case": "one"}, {"other": 1}], config={}, folder=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]
    assert sorted(path.name for path in folder.iterdir()) == ["record.json", "result.csv"]
    assert (folder / "result.csv").read_text(encoding="utf-8") == "case,ms\none,1.5\n"


def test_markers_leave_nothing_to_see():
    """A marker that is misspelt would show, or be an unexplained comment."""
    for name in PAGES:
        page = (ROOT / name).read_text(encoding="utf-8")
        assert re.findall(r"<!--\s*@", page) == ["<!--@"] * len(re.findall(MARKER, page)), name


def test_every_record_is_listed_among_the_results():
    listed = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert [folder.name for folder in FOLDERS if f"records/{folder.name}/README.md" not in listed] == []

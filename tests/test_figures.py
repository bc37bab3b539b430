"""Every measured figure of the README and of docs/ equals the one in the record that it comes from.

A marker stands behind a figure, a block at the end of the page says where each marker points; both are HTML comments,
so neither shows:

    It decodes 7.5<!--@plain12--> tokens per second.

    <!-- figures
    plain12 = 2026-11-21_offload-compressed tok_per_s[run=4, limit=12GiB, contestant=ours]
    -->

The right side is arithmetic on numbers and record columns, from left to right (`a[...] / b[...] * 100`). A record is
named once, in front. `column[key=value, ...]` is the one value that the matching rows of result.csv share (`*` matches
anything);
`least column[...]`, `most`, `mean` and `count` take several. `record.json:config.decode` is a value of record.json.
"""

import csv
import json
import operator
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
RECORDS = ROOT / "experiments" / "records"
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md") if path.name != "files.md")
PAGES = ["README.md", *PAGES]

# A number is a measured figure if one of these stands behind it (or behind the last number of "1.1 to 1.7 GB/s"),
UNITS = (
    *("tok/s", "tokens/s", "tokens per second", "tokens a second", "GB/s", "MB/s", "TFLOP/s", "GB of", "MB of", "MB"),
    *("ms", "us", "s", "seconds", "minutes", "%", "x", "times", "bits", "nats", "bits per byte"),
)
# if it has three decimals or more, if it is a decimal number in a paragraph that links to a record, or if it stands in
# a table, not in its first column, whose header or whose paragraph above has one of these words.
MEASURED_TABLE = r"[Tt]okens per second|tok/s|hit rate|registers per thread|\bload on\b|\bms\b|bits per byte"

# What has such a form and was not measured here, word for word, with the reason.
EXEMPT: dict[str, dict[str, str]] = {
    "docs/offload.md": {
        "takes 90 % of what the machine": "a setting",
        "is 90 % of what is free": "a setting",
        "bits instead of 16": "the width of a bfloat16 number",
        "13.66 GB": "the size of a checkpoint",
    },
    "docs/architectures.md": {"1 - 2 x (expected share": "a formula"},
    "docs/kernels.md": {
        "| qwen3-30b-a3b, T >= 16384, forward | 480 TFLOP/s": "a goal, marked as unmeasured",
        "| the same, forward and backward | 400 TFLOP/s": "a goal, marked as unmeasured",
        "| mixtral-8x7b, T >= 16384, forward | 550 TFLOP/s": "a goal, marked as unmeasured",
        "| fine-grained-7b, T >= 16384, forward | 330 TFLOP/s": "a goal, marked as unmeasured",
        "80 % of copy bandwidth": "a goal, marked as unmeasured",
        "85 % of copy bandwidth": "a goal, marked as unmeasured",
        "2.5 times": "a goal, marked as unmeasured",
        "788 TFLOP/s": "a data sheet, in a section that says it is an estimate",
        "128 x 256": "the size of a tile",
        "128 x 128 x 64": "the size of a tile",
        "for 22 us": "computed, in a section that says it is an estimate",
        "for 8 us": "computed, in a section that says it is an estimate",
        "some 3 us": "in a section that says it is an estimate",
        "loop at 85 %": "an assumption, in a section that says it is an estimate",
        "about 500 TFLOP/s": "computed, in a section that says it is an estimate",
        "405 -> 477 TFLOP/s": "of SGLang, named there",
    },
    "docs/placement.md": {
        "0.23 x imbalance": "a term of the objective",
        "45 % is not reached": "a goal",
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

NUMBER = r"(?<![\w.@/^-])[-+]?\d(?:[\d,]*\d)?(?:\.\d+)?(?![\d\w]|\.\d)"
MARKER = r"<!--@(?P<label>[\w.-]+)-->"
IDENTIFIER = r"\d{4}\.\d{5}"


@dataclass(frozen=True)
class Figure:
    """A number as printed, and the label of its marker if it has one."""

    text: str
    label: str | None
    line: int


def blank(pattern: str, text: str, flags: int = 0) -> str:
    """Overwrite what matches by spaces; lines stay."""
    return re.sub(pattern, lambda found: re.sub(r"[^\n]", " ", found.group()), text, flags=flags)


def prose(page: str) -> str:
    """A page without code, link targets, hidden blocks and arXiv numbers; all other characters stay where they were."""
    text = blank(r"^```.*?^```", page, re.DOTALL | re.MULTILINE)
    text = blank(r"^(?: {4}|\t)[^|\n]*$", text, re.MULTILINE)
    text = blank(r"<!--(?!@).*?-->", text, re.DOTALL)
    return blank(rf"`[^`\n]+`|\]\([^)]*\)|{IDENTIFIER}", text)


def measured(page: str, exempt: Iterable[str] = (), whole: str | None = None) -> Iterator[Figure]:
    """Every measured figure of a page, and every number that has a marker.

    Args:
        page: Markdown.
        exempt: phrases that are passed over.
        whole: how the header of a table begins that is passed over.
    """
    text = prose(page)
    for phrase in exempt:
        text = blank(re.escape(phrase), text)
    for block, above in blocks(page, text):
        if whole is None or not block.group().startswith(whole):
            begin, has_record = block.start(), "](../experiments/records/" in page[block.start() : block.end()]
            for number in reversed(list(_measured_here(block.group(), above, has_record))):
                line = text.count("\n", 0, begin + number.start()) + 1
                yield Figure(number["number"], number["label"], line)


def blocks(page: str, text: str) -> Iterator[tuple[re.Match[str], str]]:
    """Paragraphs, items of lists and tables, each with the one above it."""
    above, line = "", r"[^\n]*\S[^\n]*\n?"
    for block in re.finditer(rf"^{line}(?:^(?!\s*(?:[-*]|\d+\.) ){line})*", text, re.MULTILINE):
        yield block, above
        above = page[block.start() : block.end()]


def _measured_here(block: str, above: str, has_record: bool) -> Iterator[re.Match[str]]:
    """The measured figures of one paragraph or table, last one first."""
    units = "|".join(re.escape(unit) for unit in sorted(UNITS, key=len, reverse=True))
    columns = _measured_columns(block, above)
    chain = ""
    for number in reversed(list(re.finditer(rf"(?P<number>{NUMBER})\**(?P<percent>\s?%)?(?:{MARKER})?", block))):
        after, before = block[number.end() :], block[: number.start()].rsplit("\n", 1)[-1]
        has_unit = number["percent"] or re.match(rf"\**[\s(]*(?:{units})(?![\w/])", after)
        is_chained = chain and re.fullmatch(r"\s*(?:to|and|or|against|,|;)\s*", after[: len(after) - len(chain)])
        decimals = len(number["number"].partition(".")[2])
        chain = block[number.start() :] if has_unit or is_chained else ""
        in_table = before.startswith("|") and before.count("|") in columns
        if number["label"] or has_unit or is_chained or decimals >= 3 or (decimals and has_record) or in_table:
            yield number


def _measured_columns(block: str, above: str) -> set[int]:
    """The columns of a table (from 1) that hold measured numbers."""
    if not block.startswith("|"):
        return set()
    header = block.split("\n")[0].split("|")
    named = {place for place, cell in enumerate(header) if re.search(MEASURED_TABLE, cell)}
    return named or (set(range(2, len(header))) if re.search(MEASURED_TABLE, above) else set())


def sources(page: str) -> dict[str, str]:
    """Label -> where its figure comes from, off the block at the end of a page."""
    block = re.search(r"^<!-- figures\n(.*?)^-->", page, re.DOTALL | re.MULTILINE)
    lines = block.group(1).splitlines() if block else []
    return dict(line.split(" = ", 1) for line in lines if line.strip())


def resolve(source: str) -> float:
    """The value that a source names.

    Raises:
        ValueError: if there is no such record, file, column or row; or several values where one is meant.
    """
    record, _, expression = source.partition(" ")
    if not (RECORDS / record / "record.json").is_file():
        raise ValueError(f"there is no record {record}")
    first, *rest = re.split(r" ([-+*/]) (?=[^\]]*(?:\[|$))", expression)
    value = _term(record, first)
    for sign, term in zip(rest[::2], rest[1::2], strict=True):
        value = SIGNS[sign](value, _term(record, term))
    return value


SIGNS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
SUMMARIES: dict[str, Callable[[list[float]], float]] = {"least": min, "most": max, "mean": mean, "count": len}


def _term(record: str, term: str) -> float:
    if re.fullmatch(r"[\d.]+(?:e-?\d+)?", term):
        return float(term)
    if term.startswith("record.json:"):
        return _value_of_json(record, term.removeprefix("record.json:"))
    found = re.fullmatch(r"(?:(least|most|mean|count) )?(\w+)\[(.*)\]", term)
    if not found:
        raise ValueError(f"{term!r} is neither a number nor column[key=value, ...]")
    summary, column, conditions = found.groups()
    wanted = dict(condition.split("=", 1) for condition in re.split(r", (?=\w+=)", conditions))
    rows = [row for row in _rows(record) if all(fnmatchcase(row[key], value) for key, value in wanted.items())]
    if not rows or rows[0].get(column) in (None, ""):
        raise ValueError(f"{record}/result.csv has no {term}")
    values = [float(row[column]) for row in rows]
    if summary is None and len(set(values)) > 1:
        raise ValueError(f"{record}/result.csv has {len(values)} values of {term}; say least, most, mean or count")
    return SUMMARIES[summary or "most"](values)


@cache
def _rows(record: str) -> list[dict[str, str]]:
    with (RECORDS / record / "result.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _value_of_json(record: str, path: str) -> float:
    value: Any = json.loads((RECORDS / record / "record.json").read_text(encoding="utf-8"))
    for key in path.split("."):
        if key not in value:
            raise ValueError(f"{record}/record.json has no {path}")
        value = value[key]
    return float(value)


def faults(page: str, exempt: Iterable[str] = (), whole: str | None = None) -> list[str]:
    """What is wrong with the figures of a page, one line each."""
    known, found, used = sources(page), [], set()
    for figure in measured(page, exempt, whole):
        place = f"line {figure.line}: {figure.text}"
        if figure.label is None:
            found.append(f"{place} is a measured figure without a marker")
        elif figure.label not in known:
            found.append(f"{place} has the marker {figure.label}, which the block at the end does not explain")
        else:
            used.add(figure.label)
            try:
                value = resolve(known[figure.label])
            except (ValueError, KeyError) as error:
                found.append(f"{place}: {error}")
                continue
            decimals = len(figure.text.partition(".")[2])
            if abs(value - float(figure.text.replace(",", ""))) > 0.5 * 10**-decimals * (1 + 1e-9):
                found.append(f"{place} is {value:.{decimals + 2}f} in {known[figure.label]}")
    stray = set(re.findall(MARKER, page)) - used - {figure.label for figure in measured(page, exempt, whole)}
    return found + [f"{label} stands behind no figure" for label in sorted((known.keys() | stray) - used)]


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
    rows = [row for row in _rows("2026-11-21_kernels-ahead-of-time") if row["triton"] == "3.9.0"]
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
    ],
)
def test_what_counts_as_a_measured_figure(text, figures):
    assert [figure.text for figure in measured(text)] == figures

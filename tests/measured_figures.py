"""Measured figures on a page, and the records that they come from; what tests/test_figures.py checks.

A marker stands behind a figure. A block at the end of the page says where each marker points. Both are HTML comments,
so neither shows:

    It decodes 7.5<!--@plain12--> tokens per second.

    <!-- figures
    plain12 = 2026-11-21_offload-compressed tok_per_s[run=4, limit=12GiB, contestant=ours]
    -->

The right side names a record once, in front. Arithmetic on columns and numbers follows, from left to right:
`a[...] / b[...] * 100`.

- `column[key=value, ...]`: the one value that the matching rows of result.csv share; `*` and `?` as in file names.
- `least column[...]`, `most`, `mean`, `count`: of several rows.
- `record.json:config.decode`: a value of record.json.
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

RECORDS = Path(__file__).parent.parent / "experiments" / "records"

# A number is a measured figure if one of these stands behind it (or behind the last number of "1.1 to 1.7 GB/s"),
UNITS = (
    *("tok/s", "tokens/s", "tokens per second", "tokens a second", "GB/s", "MB/s", "TFLOP/s", "GB of", "MB of", "MB"),
    *("ms", "us", "s", "seconds", "minutes", "%", "times", "bits", "nats", "bits per byte"),
)
# if it has three decimals or more, if it is a decimal number in a paragraph that links to a record, or if it stands in
# a measured column. That is a column whose header has one of these words; or, if none has and the paragraph above the
# table does, any but the first. A column headed "default" holds settings.
MEASURED_TABLE = r"[Tt]okens per second|tok/s|hit rate|registers per thread|\bload on\b|\bms\b|bits per byte"

NUMBER = r"(?<![\w.@/^-])[-+]?\d(?:[\d,]*\d)?(?:\.\d+)?(?=x\b|(?![\d\w]|\.\d))"
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
    measured_columns, settings = _columns(block, above)
    chain = ""
    for number in reversed(list(re.finditer(rf"(?P<number>{NUMBER})\**(?P<percent>\s?%)?(?:{MARKER})?", block))):
        after, before = block[number.end() :], block[: number.start()].rsplit("\n", 1)[-1]
        column = before.count("|") if before.startswith("|") else 0
        has_unit = number["percent"] or re.match(rf"x\b|\**[\s(]*(?:{units})(?![\w/])", after)
        is_chained = chain and re.fullmatch(r"\s*(?:to|and|or|against|,|;)\s*", after[: len(after) - len(chain)])
        chain = block[number.start() :] if has_unit or is_chained else ""
        decimals = len(number["number"].partition(".")[2])
        is_figure = has_unit or is_chained or decimals >= 3 or (decimals and has_record) or column in measured_columns
        if number["label"] or (is_figure and column not in settings):
            yield number


def _columns(block: str, above: str) -> tuple[set[int], set[int]]:
    """The columns of a table (from 1) that hold measured numbers, and those that hold settings."""
    if not block.startswith("|"):
        return set(), set()
    header = dict(enumerate(block.split("\n")[0].split("|")))
    named = {place for place, cell in header.items() if re.search(MEASURED_TABLE, cell)}
    others = set(range(2, len(header))) if re.search(MEASURED_TABLE, above) else set()
    return named or others, {place for place, cell in header.items() if cell.strip() == "default"}


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
    rows = [row for row in rows_of(record) if all(fnmatchcase(row[key], value) for key, value in wanted.items())]
    if not rows or rows[0].get(column) in (None, ""):
        raise ValueError(f"{record}/result.csv has no {term}")
    values = [float(row[column]) for row in rows]
    if summary is None and len(set(values)) > 1:
        raise ValueError(f"{record}/result.csv has {len(values)} values of {term}; say least, most, mean or count")
    return SUMMARIES[summary or "most"](values)


@cache
def rows_of(record: str) -> list[dict[str, str]]:
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
    stray = set(re.findall(MARKER, prose(page))) - used - {figure.label for figure in measured(page, exempt, whole)}
    return found + [f"{label} stands behind no figure" for label in sorted((known.keys() | stray) - used)]

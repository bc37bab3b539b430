"""The tables of docs/architectures.md: each row of both catalogues has a test, a record or a reason, and a command."""

import ast
import re
from pathlib import Path

import pytest
from typer.main import get_command

from experiments.bench.claims.catalogue import CLAIMS
from experiments.cli import app
from experiments.variants.catalogue import expect_variant
from moe import ARCHITECTURES
from routing import ROUTERS

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "architectures.md").read_text(encoding="utf-8")


def table(title):
    """Rows of the table under a heading, as dicts by column."""
    body = PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]
    lines = [[cell.strip() for cell in line.split(" | ")] for line in body.splitlines() if line.startswith("| ")]
    cells = [[line[0].removeprefix("| "), *line[1:-1], line[-1].removesuffix(" |")] for line in lines]
    return [dict(zip(cells[0], row, strict=True)) for row in cells[1:]]


TABLES = {
    title: table(title)
    for title in ("Every architecture in one table", "Every router in one table", "Methods beside the two catalogues")
}
ROWS = [row for rows in TABLES.values() for row in rows]


def test_every_row_of_both_catalogues_has_one():
    names = [row["name"].strip("`") for row in TABLES["Every architecture in one table"]]
    assert sorted(names) == sorted(ARCHITECTURES)
    names = [row["name"].strip("`") for row in TABLES["Every router in one table"]]
    assert sorted(names) == sorted(ROUTERS)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: next(iter(row.values())))
def test_a_record_is_there_or_the_row_says_why_not(row):
    linked = re.search(r"\]\(\.\./(experiments/records/[^)]+)\)", row["record"])
    assert (linked and (ROOT / linked[1]).is_file()) or row["record"].startswith("none: "), row


@pytest.mark.parametrize("row", ROWS, ids=lambda row: next(iter(row.values())))
def test_the_command_that_repeats_it_exists(row):
    words = row["again"].strip("`").split()
    assert words[0] == "expertier"
    command = get_command(app).commands[words[1]]
    if hasattr(command, "commands"):
        assert words[2] in command.commands
    if words[1] == "compare":
        for name in words[words.index("--routers") + 1].split(","):
            expect_variant(name)
    if words[1:3] == ["bench", "claim"] and not words[3].startswith("-"):
        assert words[3] in CLAIMS


REFERENCES = [row for title in list(TABLES)[:2] for row in TABLES[title]]


NOTHING_TO_TRAIN = {"`hash`", "`forced`"}
"""Routers without parameters, whose weights are constants."""


def reference_of(row):
    """The functions of the file that a row names, by name, and which of them is the test."""
    (column,) = [name for name in row if name.startswith("reference test")]
    file, test = row[column].strip("`").split("::")
    tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
    return {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}, test


@pytest.mark.parametrize("row", REFERENCES, ids=lambda row: row["name"])
def test_the_reference_test_exists_and_takes_gradients(row):
    functions, test = reference_of(row)
    assert test in functions
    found, ahead = set(), [test]
    while ahead:
        names = {node.id for node in ast.walk(functions[ahead.pop()]) if isinstance(node, ast.Name)}
        ahead += [name for name in names & functions.keys() if name not in found]
        found |= names & functions.keys()
    text = "".join(ast.unparse(functions[name]) for name in {test, *found})
    assert ".grad(" in text or ".backward(" in text or row["name"] in NOTHING_TO_TRAIN

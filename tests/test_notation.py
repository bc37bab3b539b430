"""docs/notation.md against the legends (`Shapes: ...`) of all docstrings: a letter means what the page declares."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("routing", "moe", "offload", "placement", "experiments")

# (folder, letter) -> words of which a legend uses one; the folder is "" where the page declares it for all
Page = dict[tuple[str, str], tuple[str, ...]]


def page_of(text: str) -> Page:
    """What the tables declare; columns are letter, meaning, words, or folder, letter, meaning, words, collision."""
    page: Page = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("| `"):
            continue
        folder, letter, words = ("", cells[0], cells[2]) if len(cells) == 3 else (cells[0], cells[1], cells[3])
        key = folder.strip("`"), letter.strip("`")
        assert key not in page, f"{key} is declared twice"
        page[key] = tuple(word.strip() for word in words.split(","))
    return page


def legend_of(docstring: str) -> str | None:
    """The text between `Shapes:` and the end of its sentence or paragraph."""
    found = re.search(r"\bShapes: (.*?)(?:\.(?:\s|$)|\n\s*\n|\nSource)", docstring + "\n\n", re.DOTALL)
    return " ".join(found[1].split()) if found else None


def entries(legend: str) -> list[tuple[str, str]]:
    """Pairs of letter and what the legend says of it; `D and F input and output width` are two with one text."""
    pairs = []
    for entry in re.split(r"[,;]\s+(?![^()]*\))", legend):
        for part in re.split(r"\s+and\s+(?=[A-Za-z]\s+(?!and\b)\w+s\b)", entry):
            found = re.match(r"([A-Za-z])(?:\s+and\s+([A-Za-z]))?(?=\s)", part)
            assert found, f"no letter in {part!r} of the legend {legend!r}"
            pairs += [(letter, part[found.end() :]) for letter in found.groups() if letter]
    return pairs


def faults(page: Page, folder: str, docstring: str) -> list[str]:
    """Letters of a docstring's legend that the page does not declare for its folder, or not with such words."""
    legend = legend_of(docstring)
    above = ["", *("/".join(folder.split("/")[:depth]) for depth in range(1, folder.count("/") + 2))]
    wrong = []
    for letter, said in entries(legend) if legend else ():
        declared = [page[key] for key in ((where, letter) for where in above) if key in page]
        if not declared:
            wrong.append(f"{folder}: {letter} is not declared; the legend has it as {said!r}")
        elif not any(word in said for words in declared for word in words):
            wrong.append(f"{folder}: {letter} is declared as {declared}; the legend has it as {said!r}")
    return wrong


@cache
def docstrings() -> list[tuple[Path, str]]:
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    return [
        (file.relative_to(ROOT), text)
        for package in PACKAGES
        for file in sorted((ROOT / package).rglob("*.py"))
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, kinds) and (text := ast.get_docstring(node))
    ]


PAGE = page_of((ROOT / "docs" / "notation.md").read_text(encoding="utf-8"))


def test_every_letter_of_every_legend_is_declared_for_its_folder():
    assert not [
        f"{file}: {fault}" for file, text in docstrings() for fault in faults(PAGE, file.parent.as_posix(), text)
    ]


def test_every_legend_is_found():
    with_legend = [file for file, text in docstrings() if "Shapes:" in text]
    assert len(with_legend) > 140
    assert [file for file, text in docstrings() if legend_of(text)] == with_legend


@pytest.mark.parametrize(("folder", "letter"), [key for key in PAGE if key[0]])
def test_every_folder_letter_is_used_there_in_its_own_meaning(folder, letter):
    """A row that no legend needs is removed from the page."""
    without = {key: words for key, words in PAGE.items() if key != (folder, letter)}
    below = [(file.parent.as_posix(), text) for file, text in docstrings() if file.is_relative_to(folder)]
    assert any(faults(without, where, text) for where, text in below)


def test_every_letter_for_all_is_used():
    used = {letter for _, text in docstrings() if (legend := legend_of(text)) for letter, _ in entries(legend)}
    assert {letter for folder, letter in PAGE if not folder} <= used


SMALL = page_of("""
| `T` | tokens | tokens |
| `D` | model width | width |
| `moe/kernels` | `M` | rows of a tile | rows | nodes |
""")


@pytest.mark.parametrize(
    ("folder", "legend", "wrong"),
    [
        ("moe/kernels/grouped", "T tokens, M rows of a tile (of one, or of all).", None),
        ("moe/kernels", "T = B * S tokens; D their width. Without torch, Q is no letter.", None),
        ("moe/kernels", "T tokens, Q queries.", "Q is not declared"),
        ("moe/parts", "T tokens, M rows of a tile.", "M is not declared"),
        ("moe/kernels", "T temperatures.", "T is declared as"),
        ("moe/kernels", "D and T width of\ntwo things.", "T is declared as"),
    ],
)
def test_the_check_sees_one_wrong_letter(folder, legend, wrong):
    found = faults(SMALL, folder, f"A docstring.\n\nShapes: {legend}\n")
    assert [fault for fault in found if wrong and wrong in fault] == found
    assert bool(found) == bool(wrong)


def test_a_legend_without_letters_is_refused():
    with pytest.raises(AssertionError, match="no letter in 'rows of things'"):
        faults(SMALL, "moe", "Shapes: T tokens, rows of things.")

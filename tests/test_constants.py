"""Every number at the top of a module has a reason: what it trades and where it was tried, or where it comes from."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Folders and files whose constants have reasons: all packages.
EXPLAINED = ("routing", "moe", "offload", "placement", "experiments")


def is_numeric(node: ast.Assign | ast.AnnAssign) -> bool:
    """Whether a number stands in the value, however deep; truth values and numbers inside functions are none."""
    inner = [node.value] if node.value else []
    while inner:
        part = inner.pop()
        if isinstance(part, ast.Constant) and type(part.value) in (int, float):
            return True
        if not isinstance(part, ast.Lambda):
            inner += ast.iter_child_nodes(part)
    return False


def without_reason(source: str) -> list[str]:
    """Names of numeric module constants that have no comment above or behind them and no string below.

    A comment stands for all assignments that follow it line by line.
    """
    lines, body = source.splitlines(), ast.parse(source).body
    bare, explained_to = [], -1
    for place, node in enumerate(body):
        if not isinstance(node, ast.Assign | ast.AnnAssign):
            continue
        target = node.targets[0] if isinstance(node, ast.Assign) else node.target
        names = [name.id for name in ast.walk(target) if isinstance(name, ast.Name)]
        above = lines[node.lineno - 2].strip() if node.lineno > 1 else ""
        following = body[place + 1] if place + 1 < len(body) else None
        is_explained = (
            above.startswith("#")
            or explained_to == node.lineno - 1
            or "#" in lines[node.end_lineno - 1].split('"')[-1]
            or (isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant))
        )
        if is_explained:
            explained_to = node.end_lineno
        elif is_numeric(node) and all(name.lstrip("_").isupper() for name in names):
            bare += names
    return bare


def files(entry: str) -> list[Path]:
    path = ROOT / entry
    return [path] if path.is_file() else sorted(path.rglob("*.py"))


@pytest.mark.parametrize("entry", EXPLAINED)
def test_every_number_at_the_top_of_a_module_has_a_reason(entry):
    found = files(entry)
    assert found, f"{entry} does not exist"
    assert not {
        file.relative_to(ROOT).as_posix(): bare for file in found if (bare := without_reason(file.read_text("utf-8")))
    }


@pytest.mark.parametrize(
    ("source", "bare"),
    [
        ("LIMIT = 3\n", ["LIMIT"]),
        ("# larger ones leave the cache\nLIMIT = 3\n", []),
        ("LIMIT = 3  # larger ones leave the cache\n", []),
        ('LIMIT = 3\n"""Larger ones leave the cache."""\n', []),
        ("# rows and columns of a tile\nROWS = 3\nCOLUMNS: int = 4\n", []),
        ("# rows of a tile\nROWS = 3\n\nCOLUMNS = 4\n", ["COLUMNS"]),
        ("TABLE = {\n    'a': Tile(1, 2),\n}\n", ["TABLE"]),
        ("_A, _B = 1, 2\n", ["_A", "_B"]),
        ("IS_ON = True\nNAMES = ('a', 'b')\ncache = 3\nCALL = lambda x: x + 1\n", []),
        ("def f():\n    LIMIT = 3\n", []),
    ],
)
def test_the_check_sees_numbers_without_a_reason(source, bare):
    assert without_reason(source) == bare

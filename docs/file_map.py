"""Prints docs/files.md: every source file with the first line of its docstring (`make files` writes it).

With `--rooms` it rewrites the tables of rooms in docs/architecture.md, which `make files` does as well.
"""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = ("routing", "moe", "offload", "placement", "experiments")
ARCHITECTURE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- rooms: written by `make files` -->\n", "<!-- end of rooms -->\n"


def file_map() -> str:
    """The page, as Markdown."""
    lines = ["# Files", "", "Every source file and what it says of itself. Written by `make files`."]
    for package in PACKAGES:
        folders = sorted({path.parent for path in (ROOT / package).rglob("*.py")})
        for folder in folders:
            lines += ["", f"## {folder.relative_to(ROOT).as_posix()}/", "", "| file | what is there |", "|---|---|"]
            for path in sorted(folder.glob("*.py")):
                link = f"../{path.relative_to(ROOT).as_posix()}"
                lines.append(f"| [{path.name}]({link}) | {_summary(path)} |")
    return "\n".join(lines) + "\n"


def with_rooms(page: str) -> str:
    """docs/architecture.md with the tables of rooms as they should be.

    Raises:
        ValueError: if the page lacks the two comments between which the tables stand.
    """
    if page.count(BEGIN) != 1 or page.count(END) != 1:
        raise ValueError(f"{ARCHITECTURE}: expected {BEGIN.strip()} and {END.strip()} once each; put them back")
    before, rest = page.split(BEGIN)
    return before + BEGIN + _rooms() + END + rest.split(END)[1]


def _rooms() -> str:
    lines = []
    for folder, floors in _floors().items():
        lines += ["", f"### {folder}/", "", "| floor | room | what lives there |", "|---|---|---|"]
        for height, rooms in enumerate(floors, start=1):
            for room in rooms:
                inside = ROOT / folder / room / "__init__.py"
                if inside.is_file():
                    link = f"[{room}/](../{folder}/{room})"
                    lines.append(f"| {height} | {link} | {_summary(inside)} |")
    return "\n".join([*lines, "", ""])


def _floors() -> dict[str, tuple[tuple[str, ...], ...]]:
    """The literal table FLOORS of tests/test_architecture.py, read without running the tests."""
    tree = ast.parse((ROOT / "tests" / "test_architecture.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == "FLOORS":
            assert node.value is not None
            floors: dict[str, tuple[tuple[str, ...], ...]] = ast.literal_eval(node.value)
            return floors
    raise ValueError("tests/test_architecture.py has no literal table FLOORS; the floors of the rooms come from it")


def _summary(path: Path) -> str:
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split()).replace("|", "\\|")


if __name__ == "__main__":
    if sys.argv[1:] == ["--rooms"]:
        ARCHITECTURE.write_text(with_rooms(ARCHITECTURE.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print(file_map(), end="")

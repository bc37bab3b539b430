"""Prints docs/files.md: every source file with the first line of its docstring (`make files` writes it)."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = ("routing", "moe", "offload", "placement", "experiments")


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


def _summary(path: Path) -> str:
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split()).replace("|", "\\|")


if __name__ == "__main__":
    print(file_map(), end="")

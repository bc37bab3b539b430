"""Prose that a stranger can read: short sentences, and none of the phrases that only this project ever used."""

import ast
import re
import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MOST_WORDS = 25

# Pages whose sentences are short. Add a page here when it passes.
SHORT_SENTENCES = (
    *("README.md", "CONTRIBUTING.md", "docs/architecture.md", "docs/engines.md", "docs/flax.md", "docs/kernels.md"),
    *("docs/notation.md", "docs/offload.md", "docs/placement.md", "docs/results.md", "docs/routers.md"),
    *("docs/start_here.md", "docs/traces.md", "docs/training.md", "docs/checkpoints.md", "docs/distributed.md"),
    "docs/locality.md",
    "docs/finetune.md",
    "docs/conversion.md",
)
# What a stranger cannot understand, and what to write instead.
BANNED = {
    r"\bha(?:s|ve|d) the bits\b": "is bit-identical to",
    r"\b(?:with|without) the bits(?: of)?\b": "bit-identical to, not bit-identical to",
    r"\brows? of nobody\b": "padding rows",
    r"\bfillings?\b": "padding",
    r"\bwhat precede[sd] the activation\b|\bwhat preceded\b": "pre-activation",
    r"\bthe former state's part\b": "the contribution of the old state",
    r"\bdone earliest by rates\b": "the split that should finish first at the rates measured so far",
    r"\b[Ii]n brackets are figures\b": "figures in brackets come from",
    r"\bprepares each new number of rows anew\b": "builds a new primitive for each new row count",
    r"\bWhat computes\.": "Backend: torch or jax.",
    r"\bthe preset's own without it\b": "default: from the preset",
    r"\bSay speed\b": "Print speed",
    r"\badds up numbers in another order than we\b": "sums in another order than ours",
    r"\bwithout what it waited for\b": "waiting excluded",
    r"\bonly those two need\b": "name them",
    r"^The same from\b": "name the thing",
    r"^\s+\w+: (?:the \w+|of the \w+|[A-Z])\.$": "a range, a unit, an effect, or no entry",
}
# Pages, and folders of docstrings, where no such phrase is left. Add one here when it passes.
PLAIN_PAGES = (
    *("README.md", "CONTRIBUTING.md", "docs/architecture.md", "docs/architectures.md", "docs/engines.md"),
    *("docs/flax.md", "docs/notation.md", "docs/offload.md", "docs/placement.md", "docs/results.md"),
    *("docs/kernels.md", "docs/routers.md", "docs/start_here.md", "docs/traces.md", "docs/checkpoints.md"),
    "docs/conversion.md",
    "docs/locality.md",
)
PLAIN_FOLDERS = ("routing", "moe", "offload", "placement", "experiments")

ABBREVIATIONS = r"(?<!\be\.g)(?<!\bi\.e)(?<!\bet al)(?<!\bvs)(?<!\bcf)"
NAMES = r"(?:NAME(?:,? (?:and|or) |, | to | with | / )?)+"


def sentences(page: str) -> Iterator[str]:
    """The sentences of a Markdown page; code, tables and headings are none, a list of names in code is one word."""
    text = re.sub(r"<!--.*?-->", "", page, flags=re.DOTALL)
    text = re.sub(r"^```.*?^```$", "\n", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"^(?: {4}|\t|\||#).*$", "\n", text, flags=re.MULTILINE)
    text = re.sub(r"^\s*(?:[-*]|\d+\.) ", "\n\n", text, flags=re.MULTILINE)
    text = re.sub(r"`[^`]+`", "NAME", text)
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    for paragraph in re.split(r"\n\s*\n", text):
        whole = re.sub(NAMES, "NAME ", " ".join(paragraph.split()))
        yield from (part for part in re.split(rf"{ABBREVIATIONS}[.!?][)*\"']*\s+(?=[^a-z])", whole) if part.strip())


def num_words(sentence: str) -> int:
    return sum(any(letter.isalnum() for letter in word) for word in sentence.split())


def long_sentences(page: str) -> list[str]:
    return [f"{num_words(found)} words: {found}" for found in sentences(page) if num_words(found) > MOST_WORDS]


def banned(text: str) -> list[str]:
    """Each banned phrase of a text, and what to write instead."""
    return [
        f"{found.group().strip()!r}: write {better}"
        for phrase, better in BANNED.items()
        for found in re.finditer(phrase, text, re.MULTILINE)
    ]


def docstrings(source: str) -> Iterator[str]:
    """Every docstring of a file, those of attributes included."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.value.value


@pytest.mark.parametrize("name", SHORT_SENTENCES)
def test_no_sentence_is_long(name):
    assert long_sentences((ROOT / name).read_text(encoding="utf-8")) == []


def test_the_page_on_offloading_is_easy_on_the_whole():
    words = [num_words(found) for found in sentences((ROOT / "docs" / "offload.md").read_text(encoding="utf-8"))]
    assert statistics.median(words) <= 20


@pytest.mark.parametrize("name", PLAIN_PAGES)
def test_no_page_has_a_phrase_of_our_own(name):
    assert banned((ROOT / name).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("folder", PLAIN_FOLDERS)
def test_no_docstring_has_a_phrase_of_our_own(folder):
    paths = sorted((ROOT / folder).rglob("*.py"))
    assert paths
    for path in paths:
        for text in docstrings(path.read_text(encoding="utf-8")):
            assert banned(text) == [], path


@pytest.mark.parametrize(
    ("page", "words"),
    [
        ("One two three. Four five!\n\nSix", [3, 2, 1]),
        ("See Liu et al. 2024, version 2.13, e.g. here. Next one.", [9, 2]),
        ("- first item\n- second item, which\n  goes on\n\nAfter it.", [2, 5, 2]),
        (
            "# A heading\n\n| a | table |\n|---|---|\n\n    code here\n\nText (in brackets.) Then `a`, `b` and `c d`.",
            [3, 2],
        ),
        ("It has [a link](with/target.md)<!-- hidden words --> here.", [5]),
        ("```\nnot this\n```\nBut this.", [2]),
    ],
)
def test_sentences_are_told_apart(page, words):
    assert [num_words(found) for found in sentences(page)] == words


def test_a_long_sentence_is_seen():
    assert long_sentences("Word " * 25 + ".") == []
    assert long_sentences("Short one. W" + "ord " * 26 + ".")[0].startswith("26 words")
    assert long_sentences("Names: " + ", ".join("`x`" for _ in range(40)) + ".") == []


def test_a_phrase_of_our_own_is_seen():
    assert banned("One call where that has the bits.") == ["'has the bits': write is bit-identical to"]
    assert banned("Args:\n    plan: the plan.\n    slots: per layer, at least 1.\n") == [
        "'plan: the plan.': write a range, a unit, an effect, or no entry"
    ]
    assert list(docstrings('"""One."""\n\nX = 1\n"""Two."""\n\ndef f():\n    """Three."""\n    return "four"\n')) == [
        "One.",
        "Two.",
        "Three.",
    ]

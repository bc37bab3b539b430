"""The status page as a screen reader, a keyboard and weak eyes meet it; what it shows is tested in a browser."""

import re
from html.parser import HTMLParser
from importlib.resources import files

import pytest

PAGE = (files("offload.serve.web") / "status.html").read_text(encoding="utf-8")
LEAST_OF_TEXT, LEAST_OF_SHAPES = 4.5, 3.0
"""Contrast that WCAG 2.2 asks for at level AA, of text and of what is not text."""


class Elements(HTMLParser):
    """All elements of a page: tag and attributes."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))


@pytest.fixture(scope="module")
def elements():
    parser = Elements()
    parser.feed(PAGE)
    return parser.found


def of(elements, *tags):
    return [attributes for tag, attributes in elements if tag in tags]


def test_the_page_has_a_language_a_title_and_one_heading_above_the_others(elements):
    assert of(elements, "html")[0]["lang"] == "en"
    assert len(of(elements, "title")) == len(of(elements, "h1")) == len(of(elements, "main")) == 1
    assert len(of(elements, "h2")) == 3


def test_whatever_is_named_by_another_element_is_named_by_one_that_is_there(elements):
    ids = [attributes["id"] for _, attributes in elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    names = ("for", "aria-labelledby", "aria-describedby")
    assert {attributes[name] for _, attributes in elements for name in names if name in attributes} <= set(ids)


def test_fields_have_labels_and_buttons_words(elements):
    labelled = {attributes["for"] for attributes in of(elements, "label")}
    assert {attributes["id"] for attributes in of(elements, "input")} <= labelled
    assert len(re.findall(r"<button[^>]*>[A-Z][a-z ]+</button>", PAGE)) == len(of(elements, "button")) == 2


def test_tables_have_names_and_heads_and_can_be_scrolled_by_keys(elements):
    tables = of(elements, "table")
    assert len(tables) == 3
    assert all("aria-labelledby" in table for table in tables)
    assert all(head["scope"] == "col" for head in of(elements, "th"))
    assert 'made.scope = "row"' in PAGE
    regions = [attributes for attributes in of(elements, "div") if attributes.get("class") == "wide"]
    assert len(regions) == 3
    assert all(region["tabindex"] == "0" and region["role"] == "region" for region in regions)


def test_news_are_said_and_numbers_can_be_held(elements):
    assert [attributes["id"] for _, attributes in elements if attributes.get("role") == "status"] == ["lead"]
    assert [attributes["id"] for attributes in of(elements, "button") if "aria-pressed" in attributes] == ["pause"]
    # trouble is said in words, and not by its colour alone
    words = re.findall(r'say\("?([^,]+), true\)|say\(key \? "([^"]+)"', PAGE)
    assert words
    assert all("".join(pair).startswith("Trouble") for pair in words)


def luminance(colour):
    """WCAG's relative luminance of `#rgb` or `#rrggbb`."""
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    parts = [int(digits[at : at + 2], 16) / 255 for at in (0, 2, 4)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one, other):
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_contrast_is_that_of_black_on_white():
    assert contrast("#000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#fff") == pytest.approx(4.48, abs=0.01)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_colours_can_be_told_apart(scheme):
    colours = dict(re.findall(r"--(\w+): (#\w+);", re.findall(r":root \{(.*?)\}", PAGE)[scheme]))
    for name in ("ink", "soft", "accent", "bad"):
        assert contrast(colours[name], colours["paper"]) >= LEAST_OF_TEXT, name
    assert contrast(colours["edge"], colours["paper"]) >= LEAST_OF_SHAPES
    assert contrast(colours["accent"], colours["rule"]) >= LEAST_OF_SHAPES

"""Which library multiplies: measured once, remembered, and never decided by noise or by a damaged file."""

import json
import time

import pytest
import torch

from moe.parts import product_library
from moe.parts.product_library import GAIN, PRODUCTS, fastest, library_by_maker

library_of = product_library.library_of.__wrapped__
FLOAT, HALF = torch.float32, torch.bfloat16


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(
        product_library, "_others", lambda dtype: {FLOAT: ("onednn",), HALF: ("float32",)}.get(dtype, ())
    )
    return tmp_path / "expertier" / "products.json"


@pytest.fixture
def measured(monkeypatch):
    """How often something was timed; the result is what the test puts there."""
    calls = []

    def measure(products, dtype):
        calls.append((tuple(products), dtype))
        return measure.found

    measure.found, measure.calls = "onednn", calls
    monkeypatch.setattr(product_library, "fastest", measure)
    return measure


def test_a_choice_is_measured_once_and_then_remembered(cache, measured):
    assert library_of(FLOAT) == "onednn"
    assert measured.calls == [(("torch", "onednn"), FLOAT)]
    measured.found = "torch"  # another day, another mood of the machine
    assert library_of(FLOAT) == "onednn"
    assert library_of(HALF) == "torch"
    assert library_of(HALF) == "torch"
    assert len(measured.calls) == 2
    (known,) = json.loads(cache.read_text()).values()
    assert known == {"float32": "onednn", "bfloat16": "torch"}


def test_another_processor_or_torch_is_measured_anew(measured, monkeypatch):
    library_of(FLOAT)
    monkeypatch.setattr(torch, "__version__", "9.9")
    library_of(FLOAT)
    monkeypatch.setattr(product_library, "processor_fact", lambda name: "another")
    library_of(FLOAT)
    assert len(measured.calls) == 3


def test_what_another_process_wrote_meanwhile_stays(cache, monkeypatch):
    key = product_library._processor()

    def slow(products, dtype):
        cache.parent.mkdir(parents=True, exist_ok=True)
        cache.write_text(json.dumps({"other": {"float32": "torch"}, key: {"float32": "torch"}}))
        return "onednn"

    monkeypatch.setattr(product_library, "fastest", slow)
    found = library_of(FLOAT)
    assert json.loads(cache.read_text()) == {"other": {"float32": "torch"}, key: {"float32": "torch"}}
    assert found == library_by_maker(FLOAT)


@pytest.mark.parametrize("content", ["{", "[1]", '{"a": 1}', '{"KEY": {"float32": "rm"}}', "\xff", ""])
def test_a_damaged_file_is_measured_over(cache, measured, content):
    cache.parent.mkdir(parents=True)
    cache.write_text(content.replace("KEY", product_library._processor()), encoding="latin-1")
    assert library_of(FLOAT) == library_of(FLOAT) == "onednn"
    assert len(measured.calls) == 1


def test_where_nothing_can_be_remembered_no_clock_decides(monkeypatch, measured, tmp_path):
    (tmp_path / "expertier").write_text("a file where the folder should be")
    for found in ("onednn", "torch"):
        measured.found = found
        assert library_of(FLOAT) == library_by_maker(FLOAT)
    monkeypatch.delenv("XDG_CACHE_HOME")

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(product_library.Path, "home", no_home)
    assert library_of(FLOAT) == library_by_maker(FLOAT)


def test_other_formats_are_torchs(measured):
    for dtype in (torch.float64, torch.float16, torch.int64):
        assert library_of(dtype) == "torch"
    assert measured.calls == []


def _taking(seconds):
    def product(left, right):
        began = time.thread_time()
        while time.thread_time() - began < seconds:
            pass
        time.sleep(0.001)  # waiting counts for nobody
        return left

    return product


@pytest.mark.parametrize(
    ("seconds", "expected"), [(0.008, "onednn"), (0.02, "torch"), (0.02 / GAIN * 1.15, "torch"), (0.05, "torch")]
)
def test_only_a_clear_gain_leaves_torchs_own_choice(seconds, expected):
    assert fastest({"torch": _taking(0.02), "onednn": _taking(seconds)}, FLOAT) == expected


def test_the_quickest_of_several(monkeypatch):
    products = {"torch": _taking(0.02), "onednn": _taking(0.012), "float32": _taking(0.003)}
    assert fastest(products, FLOAT) == "float32"


@pytest.mark.parametrize("dtype", [FLOAT, HALF])
def test_every_product_is_the_product(dtype):
    if not torch.backends.mkldnn.is_available():
        pytest.skip("torch without oneDNN")
    left, right = torch.randint(-4, 5, (9, 20)).to(dtype), torch.randint(-4, 5, (7, 20)).to(dtype).T
    expected = (left.double() @ right.double()).to(dtype)
    assert all(torch.equal(product(left, right), expected) for product in PRODUCTS.values())


@pytest.mark.parametrize(
    ("vendor", "capability", "expected"),
    [
        ("AuthenticAMD", "AVX512", "onednn"),
        ("GenuineIntel", "AVX512", "torch"),
        ("AuthenticAMD", "AVX2", "torch"),
        ("", "AVX512", "torch"),
    ],
)
def test_without_a_measurement_the_maker_decides(vendor, capability, expected, monkeypatch):
    monkeypatch.setattr(product_library, "processor_fact", lambda _name: vendor)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert library_by_maker(FLOAT) == expected
    assert library_by_maker(HALF) == "torch"

"""Numbers with units as people write them: `80GiB`, `3.35TB/s`, `400Gb/s`, `5us`, `1979T`.

A size's bare letter is binary, as in every tool that limits memory: `8G` is 8 GiB, `8GB` is 8e9 bytes. In rates a
letter is decimal, as on data sheets.
"""

import re

_NUMBER = re.compile(r"^\s*([0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?)\s*([A-Za-zµ/]*)\s*$")
# factors of the prefixes: decimal in rates, both kinds in sizes
_DECIMAL = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
_BINARY = {"Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40, "Pi": 2.0**50}
_SIZES = {"": 1, "b": 1} | {
    letter + suffix: 1000**power if suffix == "b" else 1024**power
    for power, letter in enumerate("kmgtp", start=1)
    for suffix in ("b", "", "ib")
}
_SECONDS = {"": 1.0, "s": 1.0, "ms": 1e3, "us": 1e6, "µs": 1e6, "ns": 1e9}  # divisors: 5 / 1e6 is exactly 5e-6
_PREFIX = _DECIMAL | _BINARY


def parse_bytes(value: object) -> float:
    """Bytes from a number or from text such as `80GiB`, `80G` (the same) or `2TB`; case does not matter."""
    number, unit = _split(value, "a size such as 80GiB")
    if unit.lower() not in _SIZES:
        raise ValueError(f"expected a size such as 80GiB; got {value!r}")
    return number * _SIZES[unit.lower()]


def parse_size(text: str | int) -> int:
    """Whole bytes of a budget, such as `6GiB`, `512MB` or the number 1000000.

    Args:
        text: as a user writes it, or a number of bytes. In text, a bare number below 1 MiB is refused: whoever writes
            `6` means GiB.

    Raises:
        ValueError: if it is not a positive number with a known unit.
    """
    if isinstance(text, str) and not re.fullmatch(r"\s*[0-9.]+\s*[A-Za-z]*\s*", text):
        raise ValueError(f"cannot read {text!r} as a size; write it like 6GiB, 512MB or 4000000000")
    size = int(parse_bytes(text))
    if size <= 0:
        raise ValueError(f"a size must be positive; got {text!r}")
    if isinstance(text, str) and size < 1 << 20 and text.strip()[-1] in "0123456789.":
        raise ValueError(f"{text.strip()!r} as a size is {size} bytes; did you mean {text.strip()}GiB?")
    return size


def format_size(size: float) -> str:
    """A size as people read it, in binary units."""
    for unit, scale in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size >= scale:
            return f"{size / scale:.2f} {unit}"
    return f"{size:.0f} B"


def parse_bytes_per_s(value: object) -> float:
    """Bytes per second from a number or from text; `GB/s` are bytes, `Gb/s` are bits."""
    wanted = "a bandwidth such as 450GB/s or 400Gb/s"
    number, unit = _split(value, wanted)
    rate = unit.removesuffix("/s").removesuffix("ps")
    if rate.endswith("b"):
        return number * _prefix(rate.removesuffix("b"), value, wanted) / 8
    return number * _prefix(rate.removesuffix("B"), value, wanted)


def parse_seconds(value: object) -> float:
    """Seconds from a number or from text such as `5us`."""
    number, unit = _split(value, "a time such as 5us")
    if unit not in _SECONDS:
        raise ValueError(f"expected a time such as 5us; got {value!r}")
    return number / _SECONDS[unit]


def parse_flops(value: object) -> float:
    """Operations per second from a number or from text such as `989T`."""
    number, unit = _split(value, "a compute rate such as 989T")
    bare = re.sub(r"(?i)flops?(/s)?$", "", unit)
    return number * _prefix(bare, value, "a compute rate such as 989T")


def _split(value: object, wanted: str) -> tuple[float, str]:
    if isinstance(value, bool):
        raise ValueError(f"expected {wanted}; got {value!r}")
    if isinstance(value, int | float):
        return float(value), ""
    match = _NUMBER.match(str(value))
    if match is None:
        raise ValueError(f"expected {wanted}; got {value!r}")
    return float(match[1]), match[2]


def _prefix(text: str, value: object, wanted: str) -> float:
    if text not in _PREFIX:
        raise ValueError(f"expected {wanted}; got {value!r}")
    return _PREFIX[text]

"""What a machine can do, as measured: a few rates in a TOML file. Without torch."""

import tomllib
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path

from routing.ground.files import atomic_write

COMPRESSED_BYTES = 11 / 8
"""Bytes of a compressed bfloat16 weight."""


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """Rates of one machine, in bytes per second; `exact` and `fast` are the two arithmetics for single tokens.

    Args:
        disk_bytes_per_s: O_DIRECT reads by several threads.
        cached_bytes_per_s: reads out of the page cache by one thread.
        memory_bytes_per_s: plain reads of memory by all threads.
        exact_bytes_per_s: weights that one bfloat16 token's products read where results are bit-identical to torch's.
        fast_bytes_per_s: the same where the last bits may differ; 0 without a C compiler.
        layer_s: seconds that one decoder layer costs a token besides reading weights.
        compressed_bytes_per_s: compressed weights that one token's products read; 0 if it was not measured.
        pcie_bytes_per_s: copies from pinned host memory to the GPU; 0 without a GPU.
        gpu_bytes_per_s: reads of the GPU's memory; 0 without a GPU.
    """

    disk_bytes_per_s: float
    cached_bytes_per_s: float
    memory_bytes_per_s: float
    exact_bytes_per_s: float
    fast_bytes_per_s: float
    layer_s: float
    compressed_bytes_per_s: float = 0.0
    pcie_bytes_per_s: float = 0.0
    gpu_bytes_per_s: float = 0.0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not isinstance(value, int | float) or value < 0:
                raise ValueError(f"{name} must be a number that is not negative; got {value!r}")

    def token_rate(self, *, is_fast: bool) -> float:
        """Bytes per second of plain weights that the products of one token read.

        Args:
            is_fast: whether products may differ from torch's in the last bits.
        """
        return self.fast_bytes_per_s if is_fast and self.fast_bytes_per_s else self.exact_bytes_per_s

    def stored_rate(self, bytes_per_weight: float) -> float:
        """Stored bytes per second that the products of one token read where codes are expanded on the way.

        Taken to expand as many weights per second as compressed ones, and to read no faster than plain products do.

        Args:
            bytes_per_weight: stored bytes per weight, scales included.
        """
        most = max(self.exact_bytes_per_s, self.fast_bytes_per_s)
        return min(most, self.compressed_bytes_per_s / COMPRESSED_BYTES * bytes_per_weight or most)

    def save(self, file: Path) -> None:
        """Write the TOML file, atomically."""
        with atomic_write(file) as stream:
            stream.write("# Measured by `expertier calibrate`; bytes per second and seconds.\n")
            for name, value in asdict(self).items():
                stream.write(f"{name} = {value!r}\n")

    @classmethod
    def load(cls, file: Path) -> "Hardware":
        """Read the TOML file.

        Raises:
            ValueError: if it is not there, is not TOML, or has other keys.
        """
        if not file.is_file():
            raise ValueError(f"hardware {file}: no such file; make it with `expertier calibrate --out {file}`")
        try:
            found = tomllib.loads(file.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"hardware {file}: not TOML: {error}") from error
        expected = {field.name for field in fields(cls)}
        required = {field.name for field in fields(cls) if field.default is MISSING}
        if not required <= found.keys() <= expected:
            wrong = sorted((required - found.keys()) | (found.keys() - expected))
            raise ValueError(f"hardware {file}: expected the keys {sorted(expected)}; {wrong} differ")
        return cls(**found)

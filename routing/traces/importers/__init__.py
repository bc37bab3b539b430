"""What other programs record, read as routing traces: one file per format, validated, bounded, never executing code."""

from .catalogue import IMPORTERS, Importer, guess_format, import_trace
from .reading.arrays import load_torch
from .reading.recording import ImportOptions, Recording

__all__ = [
    "IMPORTERS",
    "ImportOptions",
    "Importer",
    "Recording",
    "guess_format",
    "import_trace",
    "load_torch",
]

"""Options of `expertier pack` for quantising."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from routing.ground.expect import expect_folder, expect_name, expect_new
from routing.ground.quantity import parse_size

from ..options import CpuMemory, Hardware, JsonFile

FORMS = ("int8", "int4", "int3", "int2", "mxfp4", "fp8")
LEVELLED = ("planes", "residual")
TERNARY = "ternary"
METHODS = ("rtn", "hqq", "gptq", "awq")
NEEDS_TEXT = ("gptq", "awq")


@dataclass(frozen=True, kw_only=True)
class LowBitOptions:
    """What to quantise by, and what to learn from."""

    method: Annotated[
        str | None,
        typer.Option("--method", help="rtn, hqq, gptq or awq; the last two need --calibrate. Default: hqq, or rtn."),
    ] = None
    group: Annotated[int, typer.Option("--group", min=16, help="Columns that share a scale of integers or planes.")] = (
        64
    )
    levels: Annotated[
        int | None, typer.Option("--levels", min=1, max=99, help="Levels of planes (default 3) or residual (8).")
    ] = None
    router_bits: Annotated[
        float | None,
        typer.Option(
            "--router-bits",
            min=0.1,
            help="With planes or residual: train a bit router that spends so many stored bits of a weight in the mean, "
            "for --depth router. Needs --calibrate TEXT.",
        ),
    ] = None
    calibrate: Annotated[
        Path | None,
        typer.Option(
            "--calibrate", help="Text to run the model on; for --fit, planes and residual also a routing trace (.npz)."
        ),
    ] = None
    tokens: Annotated[int, typer.Option("--tokens", min=64, help="Tokens of the text to read.")] = 16384
    length: Annotated[int, typer.Option("--length", min=2, help="Tokens per sequence.")] = 512
    fit: Annotated[
        str | None,
        typer.Option("--fit", help="Budget of the process, such as 6GiB: choose bits so that all experts stay in it."),
    ] = None
    open_folder: Annotated[
        Path | None,
        typer.Option("--open-folder", help="Also write a checkpoint of compressed-tensors, for other engines."),
    ] = None
    cpu_memory: CpuMemory = "auto"
    hardware: Hardware = None
    json_file: JsonFile = None

    def expect_usable(self, form: str | None, *, is_compressed: bool) -> None:
        """Refuse options that do not go together, before torch is imported.

        Raises:
            ValueError: if some do not.
        """
        is_low = form in (*FORMS, *LEVELLED, TERNARY) or self.fit is not None
        if self.method is not None:
            expect_name(self.method, METHODS, "method")
        if (self.method or self.calibrate or self.open_folder) and (is_compressed or not is_low):
            raise ValueError(
                f"--method, --calibrate and --open-folder are for quantising; add --form {', '.join(FORMS)} or --fit"
            )
        if self.fit is not None:
            parse_size(self.fit)
            if form is not None or is_compressed:
                raise ValueError("--fit chooses a form for every matrix; leave out --form and --compress")
            if self.open_folder is not None:
                raise ValueError("--open-folder needs one form for all experts; give --form instead of --fit")
        if self.method in NEEDS_TEXT and (self.calibrate is None or self.is_trace):
            raise ValueError(f"--method {self.method} learns from inputs: give --calibrate a text file or a folder")
        if form in LEVELLED and (self.method or self.open_folder):
            raise ValueError(f"{form} has a method of its own and no open form; leave out --method and --open-folder")
        if form == TERNARY and (self.method in ("hqq", "awq") or self.open_folder):
            raise ValueError("ternary weights are rounded by rtn or gptq, and have no open form")
        if self.router_bits is not None and (form not in LEVELLED or self.calibrate is None or self.is_trace):
            raise ValueError("--router-bits is for --form planes or residual, and learns from --calibrate TEXT")
        if self.method == "hqq" and form is not None and not form.startswith("int"):
            raise ValueError(f"hqq fits the zeros of integers; {form} has none, use --method rtn or gptq")
        if self.calibrate is not None and not self.calibrate.exists():
            raise ValueError(f"calibrate {self.calibrate}: no such file or folder")
        if self.cpu_memory != "auto":
            parse_size(self.cpu_memory)
        if self.open_folder is not None:
            expect_new(self.open_folder)
        expect_folder(self.json_file)

    @property
    def is_trace(self) -> bool:
        """Whether what to calibrate on is a routing trace."""
        return self.calibrate is not None and self.calibrate.suffix == ".npz"

    def method_for(self, form: str | None) -> str:
        """The method: by default the best that needs no text; of ternary weights, the best that there is one for."""
        if form == TERNARY and self.method is None:
            return "rtn" if self.calibrate is None or self.is_trace else "gptq"
        return self.method or ("hqq" if form is None or form.startswith("int") else "rtn")

    def quantises(self, model: str, form: str | None) -> bool:
        """Whether this is work for a method: not where the checkpoint stores its experts in the form already."""
        if self.fit is not None or self.method is not None:
            return True
        if form not in FORMS:
            return form in (*LEVELLED, TERNARY)
        from ...checkpoint.model_folder import skeleton_of
        from ...formats.catalogue import form_in_place

        return all(form_in_place(layer).name != form for layer in skeleton_of(model)[2])

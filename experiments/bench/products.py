"""`expertier bench products`: how fast products of a few rows read stored weights, beside plain reading."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from routing.ground.expect import expect_name
from routing.ground.terminal import plain_console

from ..evidence.record import RECORDS, expect_records, save_record
from .listed import listed

# as `offload.product_rates` knows them, which needs torch
FORMS = (
    *("plain", "compressed", "mxfp4", "fp8", "int4", "int8", "int3", "int2", "planes-2", "planes-3", "planes-4"),
    *("residual-2", "residual-4", "residual-8", "ternary"),
    *("q4_0", "q8_0", "q4_k", "q6_k"),
)
GIGA = 1e9
SEED = 0


def bench_products(
    form: Annotated[list[str] | None, typer.Option(help="A stored form; repeat for more.")] = None,
    rows: Annotated[str, typer.Option(help="Rows of the input, with commas.")] = "1,4,16",
    size: Annotated[str, typer.Option(help="Stored bytes of each form; more than the last cache holds.")] = "640MiB",
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 2,
    repeats: Annotated[int, typer.Option(min=2, help="Timed rounds; all contestants take turns.")] = 7,
    record: Annotated[bool, typer.Option("--record", help="Keep the result under experiments/records.")] = False,
    records: Annotated[Path, typer.Option(help="Where records live.")] = RECORDS,
) -> None:
    """Time products from stored weights in every order of summation that this processor has.

    Products are compared with those of the plain matrices first, bit by bit. The environment variable
    EXPERTIER_WITHOUT=amx,avx512 forbids instruction sets.

    Example: `expertier bench products --form plain --form mxfp4 --rows 1,4`
    """
    import torch

    from offload import parse_size, product_rates

    expect_records(records)
    forms = form or list(FORMS)
    for name in forms:
        expect_name(name, FORMS, "form")
    counts, before = listed(rows, "--rows"), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = product_rates(forms, counts, nbytes=parse_size(size), repeats=repeats)
    finally:
        torch.set_num_threads(before)
    reading = found[0]["bytes_per_s_p50"]
    table = Table("order", "form", "rows", "bits", "stored GB/s", "p20", "p80", "of plain reading", "G weights/s")
    for row in found:
        rates = [f"{row[f'bytes_per_s_{name}'] / GIGA:.2f}" for name in ("p50", "p20", "p80")]
        shares = f"{row['bytes_per_s_p50'] / reading:.2f}", f"{8 * row['bytes_per_s_p50'] / row['bits'] / GIGA:.2f}"
        table.add_row(row["order"], row["form"], str(row["rows"]), f"{row['bits']:.2f}", *rates, *shares)
    plain_console().print(table)
    if record:
        config = {"rows": counts, "size": size, "threads": threads, "repeats": repeats}
        typer.echo(f"record: {save_record('offload-products', found, config=config, seed=SEED, folder=records)}")

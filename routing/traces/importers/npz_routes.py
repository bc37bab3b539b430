"""A .npz per request with `routed_experts [tokens, layers, K]`: one file, or a folder of them in order of names."""

from pathlib import Path

from .reading.arrays import load_npz
from .reading.opening import files_of, id_table, wanted
from .reading.recording import ImportOptions, Recording, one_after_another, without_dense_layers


def read_npz_routes(path: Path, options: ImportOptions) -> Recording:
    """Read every request; where the file holds the token ids too, their number must fit."""
    tables = []
    for file in files_of(path, "*.npz"):
        arrays = load_npz(file)
        (routed,) = wanted(dict(arrays), str(file), "routed_experts")
        table = id_table(routed, f"{file}, routed_experts", "[tokens, layers, K]")
        sizes = [len(arrays[name]) for name in ("prompt_token_ids", "output_token_ids") if name in arrays]
        # the last token that was generated is not routed, unless the recorder ran it once more
        if len(sizes) == 2 and len(table) not in (sum(sizes), sum(sizes) - 1):
            raise ValueError(f"{file}: {len(table)} rows for {sizes[0]} prompt and {sizes[1]} generated tokens")
        tables.append(table)
    rows_TLK, sequence_T, position_T = one_after_another(tables, str(path))
    expert_TLK, layer_ids, dense = without_dense_layers(rows_TLK, str(path))
    return Recording(
        expert_TLK=expert_TLK,
        sequence_T=sequence_T,
        position_T=position_T,
        layer_ids=layer_ids,
        hidden_layers=rows_TLK.shape[1] if layer_ids else None,
        read={"lines": len(tables), "tokens": len(rows_TLK), "layers": rows_TLK.shape[1]},
        left_out=(dense,),
    )

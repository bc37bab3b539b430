"""One matrix in each stored form, as its owner writes it, and what its owner makes of it.

Each function takes a weight `[rows, columns]` and gives the stored tensors by the last part of their names, and the
bfloat16 matrix of the owner's own dequantisation: transformers' converter, compressed-tensors, or torch's float8.
"""

import functools

import torch

BF16 = torch.bfloat16


def _blocks(scale, rows, columns, block):
    """A scale for each weight, last blocks cut."""
    return scale.repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]


def fp8_blocks(weight, generator, *, block=(40, 40), dtype=torch.float32, name="weight_scale_inv"):
    """DeepSeek, Qwen, GLM, MiniMax; E8M0 scales as DeepSeek-V4's dense layers."""
    rows, columns = weight.shape
    grid = -(-rows // block[0]), -(-columns // block[1])
    codes = (100 * torch.randn(rows, columns, generator=generator)).to(torch.float8_e4m3fn)
    scale = (0.001 * torch.rand(grid, generator=generator) + 1e-5).to(dtype)
    plain = (codes.float() * _blocks(scale.float(), rows, columns, block)).to(BF16)
    return {"weight": codes, name: scale}, plain


def fp8_by_transformers(weight, generator):
    """Whole blocks, expanded by transformers' own operation."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    stored, _ = fp8_blocks(weight, generator, block=(16, 32))
    return stored, Fp8Dequantize(None)._dequantize_one(stored["weight"], stored["weight_scale_inv"], BF16)


def fp8_rows(weight, generator, *, dtype=BF16):
    """llm-compressor and FBGEMM: a scale for each row."""
    codes = (100 * torch.randn(weight.shape, generator=generator)).to(torch.float8_e4m3fn)
    scale = (0.001 * torch.rand(len(weight), 1, generator=generator)).to(dtype)
    return {"weight": codes, "weight_scale": scale}, (codes.float() * scale.float()).to(BF16)


def fp8_whole(weight, generator):
    """ModelOpt: one scale, and one of the activations that is not used."""
    codes = (100 * torch.randn(weight.shape, generator=generator)).to(torch.float8_e4m3fn)
    scale = torch.tensor(0.00123)
    stored = {"weight": codes, "weight_scale": scale, "input_scale": torch.tensor(0.5)}
    return stored, (codes.float() * scale).to(BF16)


def mxfp8(weight, generator, *, dtype=torch.uint8):
    """MiniMax-M3: an exponent for each 32 columns, by transformers' own operation."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    rows, columns = weight.shape
    codes = (100 * torch.randn(rows, columns, generator=generator)).to(torch.float8_e4m3fn)
    scale = torch.randint(110, 120, (rows, columns // 32), dtype=torch.uint8, generator=generator)
    scale = scale.view(torch.float8_e8m0fnu) if dtype != torch.uint8 else scale
    stored = {"weight": codes, "weight_scale_inv": scale}
    return stored, Fp8Dequantize(None)._dequantize_one(codes, scale, BF16)


def deepseek_fp4(weight, generator):
    """DeepSeek-V4: two E2M1 in an int8, E8M0 scales called `scale`, by transformers' own operation."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    rows, columns = weight.shape
    codes = torch.randint(-128, 128, (rows, columns // 2), dtype=torch.int8, generator=generator)
    scale = torch.randint(117, 124, (rows, columns // 32), dtype=torch.uint8, generator=generator)
    scale = scale.view(torch.float8_e8m0fnu)
    return {"weight": codes, "scale": scale}, Fp8Dequantize(None)._dequantize_one(codes, scale, BF16)


def _scheme(**weights):
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    return QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights))


def packed_integers(weight, generator, *, bits=4, symmetric=True, group=32, dtype=BF16):
    """Kimi-K2 and llm-compressor, by compressed-tensors."""
    from compressed_tensors.compressors import PackedQuantizationCompressor as Owner

    rows, columns = weight.shape
    strategy = {"strategy": "group", "group_size": group} if group else {"strategy": "channel"}
    scheme = _scheme(num_bits=bits, type="int", symmetric=symmetric, **strategy)
    grid = rows, columns // group if group else 1
    half = 1 << (bits - 1)
    state = {"weight": weight.to(dtype), "weight_scale": (torch.rand(grid, generator=generator) / half / 4).to(dtype)}
    if not symmetric:
        state["weight_zero_point"] = torch.randint(-half, half, grid, dtype=torch.int8, generator=generator)
    stored = Owner.compress(state, scheme)
    # codes of the whole range, which rounding small weights does not give
    stored["weight_packed"] = torch.randint(
        -(1 << 31), 1 << 31, stored["weight_packed"].shape, dtype=torch.int64, generator=generator
    ).int()
    return stored, Owner.decompress(stored, scheme)["weight"].to(BF16)


def nvfp4(weight, generator, *, by="compressed-tensors"):
    """By compressed-tensors, whose global scale divides, or as ModelOpt, whose second scale multiplies."""
    from compressed_tensors.compressors import NVFP4PackedCompressor as Owner

    rows, columns = weight.shape
    codes = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8, generator=generator)
    scale = (300 * torch.rand(rows, columns // 16, generator=generator)).to(torch.float8_e4m3fn)
    common = torch.tensor([5000 + 3000 * float(torch.rand((), generator=generator))])
    stored = {"weight_packed": codes, "weight_scale": scale, "weight_global_scale": common}
    scheme = _scheme(num_bits=4, type="float", symmetric=True, strategy="tensor_group", group_size=16)
    plain = Owner.decompress(stored, scheme)["weight"].to(BF16)
    if by == "compressed-tensors":
        return {**stored, "input_global_scale": torch.ones(1)}, plain
    factor = (1 / common).squeeze()
    values = Owner.decompress(
        {**stored, "weight_scale": torch.ones_like(scale)} | {"weight_global_scale": None}, scheme
    )
    spread = (scale.float() * factor).repeat_interleave(16, 1)
    stored = {"weight": codes, "weight_scale": scale, "weight_scale_2": factor, "input_scale": torch.tensor(1.0)}
    return stored, (values["weight"].float() * spread).to(BF16)


def packed_mxfp4(weight, generator):
    """Kimi-K3's spelling, by compressed-tensors."""
    from compressed_tensors.compressors import MXFP4PackedCompressor as Owner

    rows, columns = weight.shape
    codes = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8, generator=generator)
    scale = torch.randint(117, 124, (rows, columns // 32), dtype=torch.uint8, generator=generator)
    stored = {"weight_packed": codes, "weight_scale": scale}
    scheme = _scheme(num_bits=4, type="float", symmetric=True, strategy="group", group_size=32)
    return stored, Owner.decompress(stored, scheme)["weight"].to(BF16)


def int8_rows(weight, generator):
    """llm-compressor's W8A8: a scale for each row, by compressed-tensors."""
    from compressed_tensors.compressors import NaiveQuantizationCompressor as Owner

    codes = torch.randint(-128, 128, weight.shape, dtype=torch.int8, generator=generator)
    scale = (0.001 * torch.rand(len(weight), 1, generator=generator)).to(BF16)
    stored = {"weight": codes, "weight_scale": scale}
    scheme = _scheme(num_bits=8, type="int", symmetric=True, strategy="channel")
    return stored, Owner.decompress(stored, scheme)["weight"].to(BF16)


def _pack_words(number_NI, bits, order=None):
    """Numbers along the last dimension as words of 32 bits."""
    count = 32 // bits
    number_NIJ = number_NI.long().view(len(number_NI), -1, count)
    number_NIJ = number_NIJ if order is None else number_NIJ[..., order]
    word_NI = (number_NIJ << bits * torch.arange(count)).sum(dim=-1)
    return torch.where(word_NI >= 1 << 31, word_NI - (1 << 32), word_NI).int()


def turned_integers(
    weight, generator, *, by="gptq", bits=4, group=32, is_sorted=False, is_older=True, dtype=torch.float16
):
    """GPTQ and AWQ, packed here; expanded as GPTQModel's and AutoAWQ's own code does, in the dtype of the scales."""
    rows, columns = weight.shape
    most = 1 << bits
    code_IO = torch.randint(0, most, (columns, rows), generator=generator)
    zero_GO = torch.randint(1, most, (columns // group, rows), generator=generator)
    scale_GO = (0.01 * torch.rand(columns // group, rows, generator=generator)).to(dtype)
    group_I = torch.arange(columns) // group
    if is_sorted:
        group_I = group_I[torch.randperm(columns, generator=generator)]
    plain = (scale_GO[group_I] * (code_IO - zero_GO[group_I])).to(BF16).t()
    if by == "awq":
        order = [0, 2, 4, 6, 1, 3, 5, 7]
        stored = {"qweight": _pack_words(code_IO, 4, order), "qzeros": _pack_words(zero_GO, 4, order)}
        return {**stored, "scales": scale_GO}, plain
    stored = {
        "qweight": _pack_words(code_IO.t(), bits).t(),
        "qzeros": _pack_words(zero_GO - int(is_older), bits),
        "scales": scale_GO,
        "g_idx": group_I.int(),
    }
    return stored, plain


def nf4(weight, generator, *, is_nested=False):
    """bitsandbytes, as its own code for CPUs computes: a table of float32 times the largest of each 32.

    Nested scales are codes of a table themselves, times a scale for each 4 of them, and an offset.
    """
    import json

    from offload.codes.decode import NF4

    rows, columns = weight.shape
    codes = torch.randint(0, 256, (rows * columns // 2, 1), dtype=torch.uint8, generator=generator)
    absmax = 0.1 * torch.rand(rows * columns // 32, generator=generator)
    beside = {"absmax": absmax, "quant_map": torch.tensor(NF4)}
    state = {"quant_type": "nf4", "blocksize": 32, "dtype": "bfloat16", "shape": [rows, columns]}
    if is_nested:
        table, block = torch.linspace(-1, 1, 256), 0.1 * torch.rand(-(-len(absmax) // 4), generator=generator)
        code = torch.randint(0, 256, absmax.shape, dtype=torch.uint8, generator=generator)
        state |= {"nested_blocksize": 4, "nested_dtype": "float32", "nested_offset": 0.04321}
        absmax = table[code.long()] * block.repeat_interleave(4)[: len(code)] + 0.04321
        beside |= {"absmax": code, "nested_absmax": block, "nested_quant_map": table}
    number = torch.stack((codes >> 4, codes & 15), dim=-1).view(-1, 32).long()
    plain = (torch.tensor(NF4)[number] * absmax[:, None]).to(BF16).view(rows, columns)
    beside["quant_state.bitsandbytes__nf4"] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return {"weight": codes, **{f"weight.{name}": tensor for name, tensor in beside.items()}}, plain


def act_order(weight, generator):
    """llm-compressor's GPTQ with actorder "group", by its equation: compressed-tensors 0.20 no longer has it."""
    stored, _ = packed_integers(weight, generator)
    group_I = torch.randperm(weight.shape[1], generator=generator) // 32
    word_OI = stored["weight_packed"][..., None] >> 4 * torch.arange(8, dtype=torch.int32)
    code_OI = (word_OI & 15).flatten(1) - 8
    return stored | {"weight_g_idx": group_I.int()}, code_OI.to(BF16) * stored["weight_scale"][:, group_I]


def llm_int8(weight, generator):
    """bitsandbytes' LLM.int8, expanded as its own `int8_vectorwise_dequant` does, in float32."""
    codes = torch.randint(-128, 128, weight.shape, dtype=torch.int8, generator=generator)
    scale = 0.5 * torch.rand(len(weight), generator=generator)
    stored = {"weight": codes, "SCB": scale, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    return stored, (codes * scale.view(-1, 1) * 7.874015718698502e-3).to(BF16)


def _hqq_packed(line_XY, bits):
    """hqq's packing: the first lines in the highest bits."""
    count, dtype = (10, torch.int32) if bits == 3 else (8 // bits, torch.uint8)
    padded = torch.nn.functional.pad(line_XY, (0, 0, 0, -len(line_XY) % count))
    parts = padded.to(dtype).chunk(count)
    return sum(part << bits * (count - 1 - number) for number, part in enumerate(parts)).to(dtype)


def hqq(weight, generator, *, bits=4, group=32, axis=1, dtype=BF16, is_float=False):
    """HQQ as hqq's `state_dict` writes it, expanded as its `Quantizer.dequantize` does, in the dtype of the scales."""
    rows, columns = weight.shape
    count = weight.numel() // group
    lines = (count, group) if axis == 1 else (group, count)
    code = torch.randint(0, 1 << bits, lines, generator=generator)
    one = (count, 1) if axis == 1 else (1, count)
    scale = (0.01 * torch.rand(one, generator=generator)).to(dtype)
    zero = ((1 << bits) * torch.rand(one, generator=generator)).to(dtype)
    plain = ((code.to(dtype) - zero) * scale).reshape(rows, columns).to(BF16)
    packed, packing = _hqq_packed(code, bits), "3bit_32" if bits == 3 else f"{bits}bit_u8"
    texts = {"packing": packing, "compute_dtype": str(dtype)}
    numbers = {"nbits": bits, "group_size": group, "axis": axis}
    flags = {"view_as_float": is_float, "quant_zero": False, "quant_scale": False, "stores_quant_config": True}
    return {
        "W_q": packed.view(dtype) if is_float else packed,
        "scale": scale,
        "zero": zero,
        "shape": torch.tensor(weight.shape),
        **{name: torch.tensor(number, dtype=torch.int32) for name, number in numbers.items()},
        **{name: torch.tensor(int(flag), dtype=torch.uint8) for name, flag in flags.items()},
        **{name: torch.tensor(list(text.encode()), dtype=torch.uint8) for name, text in texts.items()},
    }, plain


def _groups(**weights):
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": weights}}}


FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [40, 40]}
INT4 = _groups(num_bits=4, type="int", strategy="group", group_size=32)
INT8 = _groups(num_bits=8, type="int", strategy="group", group_size=32)
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "checkpoint_format": "gptq"}
HQQ = {"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 4, "group_size": 32}}}
PACKED_AS = {
    "gptq": "int4",
    "gptq 8 bits": "int8",
    "gptq v2": "int4",
    "gptq sorted": "int4",
    "awq": "int4",
    "hqq": "int4",
    "hqq float16": "int4",
    "hqq 8 bits": "int8",
    "hqq 3 bits": "int3",
    "hqq 2 bits": "int2",
    "hqq 1 bit": "int1",
    "hqq float": "int4",
}
"""Forms that a packed copy turns to rows."""
NOT_PACKED = ("hqq axis 0", "hqq across rows")
"""Forms whose groups are no runs of rows."""
partial = functools.partial
FORMATS = {
    "fp8 blocks F32": ("fp8", FP8, fp8_blocks),
    "fp8 blocks BF16": ("fp8", FP8, partial(fp8_blocks, dtype=BF16)),
    "fp8 blocks E8M0": ("fp8", FP8, partial(fp8_blocks, dtype=torch.float8_e8m0fnu, name="scale")),
    "fp8 transformers": ("fp8", FP8 | {"weight_block_size": [16, 32]}, fp8_by_transformers),
    "fp8 rows": ("fp8", _groups(num_bits=8, type="float", strategy="channel"), fp8_rows),
    "fp8 rows F32": ("fp8", {"quant_method": "fbgemm_fp8"}, partial(fp8_rows, dtype=torch.float32)),
    "fp8 whole": ("fp8", {"quant_method": "modelopt", "quant_algo": "FP8"}, fp8_whole),
    "mxfp8 U8": ("mxfp8", {"quant_method": "mxfp8"}, mxfp8),
    "mxfp8 E8M0": ("mxfp8", {"quant_method": "fp8"}, partial(mxfp8, dtype=torch.float8_e8m0fnu)),
    "deepseek fp4": ("mxfp4", {"quant_method": "fp8", "expert_dtype": "fp4"}, deepseek_fp4),
    "mxfp4 packed": ("mxfp4", _groups(num_bits=4, type="float", group_size=32), packed_mxfp4),
    "nvfp4 packed": ("nvfp4", _groups(num_bits=4, type="float", group_size=16), nvfp4),
    "nvfp4 modelopt": ("nvfp4", {"quant_method": "modelopt", "quant_algo": "NVFP4"}, partial(nvfp4, by="modelopt")),
    "int4": ("int4", INT4, packed_integers),
    "int4 float16": ("int4", INT4, partial(packed_integers, dtype=torch.float16)),
    "int4 zeros": ("int4", INT4, partial(packed_integers, symmetric=False)),
    "int4 rows": ("int4", _groups(num_bits=4, type="int", strategy="channel"), partial(packed_integers, group=0)),
    "int8 packed": ("int8", _groups(num_bits=8, group_size=32), partial(packed_integers, bits=8)),
    "int8 packed zeros": (
        "int8",
        _groups(num_bits=8, group_size=32),
        partial(packed_integers, bits=8, symmetric=False),
    ),
    "gptq": ("gptq", GPTQ, turned_integers),
    "gptq 8 bits": ("gptq", GPTQ | {"bits": 8}, partial(turned_integers, bits=8)),
    "gptq v2": ("gptq", GPTQ | {"checkpoint_format": "gptq_v2"}, partial(turned_integers, is_older=False)),
    "gptq sorted": ("gptq", GPTQ | {"desc_act": True}, partial(turned_integers, is_sorted=True)),
    "awq": ("awq", {"quant_method": "awq", "bits": 4, "group_size": 32}, partial(turned_integers, by="awq")),
    "nf4": ("nf4", {"quant_method": "bitsandbytes", "load_in_4bit": True}, nf4),
    "nf4 nested": ("nf4", {"quant_method": "bitsandbytes", "load_in_4bit": True}, partial(nf4, is_nested=True)),
    "int4 sorted": ("int4", INT4, act_order),
    "int8 bitsandbytes": ("int8", {"quant_method": "bitsandbytes", "load_in_8bit": True}, llm_int8),
    "hqq": ("hqq", HQQ, hqq),
    "hqq float16": ("hqq", HQQ, partial(hqq, dtype=torch.float16, group=16)),
    "hqq float": ("hqq", HQQ, partial(hqq, is_float=True)),
    "hqq 8 bits": ("hqq", HQQ, partial(hqq, bits=8, dtype=torch.float32)),
    "hqq 3 bits": ("hqq", HQQ, partial(hqq, bits=3)),
    "hqq 2 bits": ("hqq", HQQ, partial(hqq, bits=2, dtype=torch.float16)),
    "hqq 1 bit": ("hqq", HQQ, partial(hqq, bits=1)),
    "hqq axis 0": ("hqq", HQQ, partial(hqq, axis=0)),
    "hqq across rows": ("hqq", HQQ, partial(hqq, group=128)),
    "int8 rows": ("int8", _groups(num_bits=8, type="int", strategy="channel"), int8_rows),
}
"""What a form is called, what config.json says, and what writes a matrix."""

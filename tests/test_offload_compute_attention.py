"""Attention of single tokens: rotary positions by our C, and keys that are not repeated; torch's bits in both."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers.models.gemma2 import modeling_gemma2
from transformers.models.glm import modeling_glm
from transformers.models.glm4_moe import modeling_glm4_moe
from transformers.models.gpt_oss import modeling_gpt_oss
from transformers.models.qwen3_moe import modeling_qwen3_moe

from offload.compute import attention, rotary
from offload.compute.attention import Repeated, SharedProducts, quicken_attention
from offload.compute.rotary import TokenRotary

HALVES, SHARED_ANGLES = modeling_qwen3_moe.apply_rotary_pos_emb, modeling_gpt_oss.apply_rotary_pos_emb

FIRST_COLUMNS = modeling_glm4_moe.apply_rotary_pos_emb


@pytest.fixture(autouse=True)
def _one_module_is_enough(monkeypatch):
    monkeypatch.setattr(attention, "LEAST_MODULES", 1)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def rotary_arguments(width, angles, heads=6, length=1):
    return (
        normal(1, heads, length, width), normal(1, 2, length, width, seed=1),
        normal(1, length, angles, seed=2), normal(1, length, angles, seed=3),
    )  # fmt: skip


def counted(monkeypatch, owner, name):
    calls, original = [], getattr(owner, name)

    def count(*args, **kwargs):
        calls.append(args)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, count)
    return calls


@pytest.mark.parametrize(
    ("function", "share"),
    [(HALVES, 1), (SHARED_ANGLES, 2), (FIRST_COLUMNS, 2)],
    ids=["halves", "shared angles", "first"],
)
@pytest.mark.parametrize("width", [8, 64, 80, 128])
def test_rotary_bits_are_those_of_torch(function, share, width, monkeypatch):
    if rotary._kernel() is None:
        pytest.skip("no C compiler")
    ours = TokenRotary(function)
    for scale in (0.01, 1, 100):
        arguments = [argument * scale for argument in rotary_arguments(width, width // share)]
        assert all(map(torch.equal, ours(*arguments), function(*arguments)))
    calls = counted(monkeypatch, rotary, "_rotate")
    ours(*rotary_arguments(width, width // share))
    assert len(calls) == 1


def test_rotary_of_other_families_and_shapes_is_their_own(monkeypatch):
    partial = TokenRotary(modeling_glm.apply_rotary_pos_emb)
    arguments = rotary_arguments(64, 32)
    assert all(map(torch.equal, partial(*arguments), modeling_glm.apply_rotary_pos_emb(*arguments)))
    almost = TokenRotary(lambda q, k, cos, sin: tuple(states * 1.5 for states in HALVES(q, k, cos, sin)))
    ours, calls = TokenRotary(HALVES), counted(monkeypatch, rotary, "_rotate")
    assert torch.equal(almost(*rotary_arguments(16, 16))[0], HALVES(*rotary_arguments(16, 16))[0] * 1.5)
    assert len(calls) == (rotary._kernel() is not None)  # the trial
    calls.clear()
    for arguments in (
        rotary_arguments(16, 16, length=3),
        [argument.float() for argument in rotary_arguments(16, 16)],
        [argument.requires_grad_() for argument in rotary_arguments(16, 16)],
    ):
        assert all(map(torch.equal, ours(*arguments), HALVES(*arguments)))
    with pytest.raises(TypeError):
        ours(1, 2, 3)
    assert not calls


def sizes(heads, shared, width, **more):
    config = SimpleNamespace(
        hidden_size=32, num_attention_heads=heads, num_key_value_heads=shared, head_dim=width, attention_dropout=0.0,
        attention_bias=False, sliding_window=None, rms_norm_eps=1e-6, _attn_implementation="eager",
        layer_types=["full"], query_pre_attn_scalar=16, attn_logit_softcapping=3.0, use_bidirectional_attention=False,
    )  # fmt: skip
    return vars(config).update(more) or config


ATTENTIONS = {
    "sinks": modeling_gpt_oss.GptOssAttention,
    "norms": modeling_qwen3_moe.Qwen3MoeAttention,
    "soft cap": modeling_gemma2.Gemma2Attention,
}


def attention_of(kind, heads=8, shared=2, width=16, **more):
    module = ATTENTIONS[kind](sizes(heads, shared, width, **more), 0).bfloat16().eval().requires_grad_(False)
    for number, parameter in enumerate(module.parameters()):
        parameter.copy_(normal(*parameter.shape, seed=number))
    return module


class Held:
    """A cache of one layer."""

    def __init__(self, keys, values):
        self.states = [keys, values]

    def update(self, keys, values, layer, *args):
        return [torch.cat([old, new], dim=-2) for old, new in zip(self.states, (keys, values), strict=True)]


def attend(module, positions, kind, length=1):
    angles = 8 if kind == "sinks" else 16
    held = Held(normal(1, 2, positions, 16, seed=4), normal(1, 2, positions, 16, seed=5))
    x, embedding = normal(1, length, 32), (normal(1, length, angles, seed=2), normal(1, length, angles, seed=3))
    return module(x, embedding, None, held)[0]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kind", ATTENTIONS)
def test_attention_bits_are_those_of_the_family(kind, threads):
    module = attention_of(kind)
    lengths = [1, 2, 7, 16, 17, 33, 64, 65, 66, 128, 200, 299]
    torch.set_num_threads(threads)
    expected = [attend(module, length, kind) for length in lengths]
    quicken_attention(nn.ModuleList([module]))
    assert "forward" in vars(module)
    for _ in range(2):
        assert all(torch.equal(attend(module, n, kind), each) for n, each in zip(lengths, expected, strict=True))
    torch.set_num_threads(1)


def test_keys_of_a_token_are_not_repeated_and_those_of_a_prompt_are(monkeypatch):
    module = attention_of("sinks")
    quicken_attention(nn.ModuleList([module]))
    monkeypatch.setattr(SharedProducts, "_try", lambda products, like, shared: True)
    repeats, together = counted(monkeypatch, Repeated, "repeated"), counted(monkeypatch, attention, "_together")
    attend(module, 70, "sinks")
    assert (len(together), len(repeats)) == (2, 0)
    attend(module, 70, "sinks", length=3)
    assert (len(together), len(repeats)) == (2, 0)


def test_a_model_of_few_layers_repeats_keys_because_each_length_has_to_be_tried(monkeypatch):
    monkeypatch.setattr(attention, "LEAST_MODULES", 3)
    modules = [attention_of("sinks") for _ in range(5)]
    quicken_attention(nn.ModuleList(modules[:2]))
    quicken_attention(nn.ModuleList(modules[2:]))
    tried = counted(monkeypatch, SharedProducts, "_try")
    attend(modules[0], 70, "sinks")
    assert not tried
    for module in modules[2:]:
        attend(module, 70, "sinks")
    assert len(tried) == 2


def test_another_order_of_sums_is_noticed(monkeypatch):
    module = attention_of("sinks")
    expected = attend(module, 70, "sinks")

    def reversed_sums(row_1H1M, matrix_JMN, together=attention._together):
        return together(row_1H1M.flip(3), matrix_JMN.flip(1))

    monkeypatch.setattr(attention, "_together", reversed_sums)
    quicken_attention(nn.ModuleList([module]))
    assert torch.equal(attend(module, 70, "sinks"), expected)


def test_what_a_family_may_also_do_with_repeated_keys():
    states, products = normal(1, 2, 5, 4), SharedProducts()
    plain = states.repeat_interleave(3, dim=1)
    ours = Repeated(states, 3, products)
    assert ours.dtype == states.dtype
    assert ours.shape == plain.shape
    assert torch.equal(ours.transpose(1, 2), plain.transpose(1, 2))
    assert torch.equal(ours.transpose(-1, -2).transpose(2, 3), plain)
    assert torch.equal(torch.mul(ours, 2), plain * 2)
    two_rows = normal(1, 6, 2, 4)
    assert torch.equal(torch.matmul(two_rows, ours.transpose(2, 3)), torch.matmul(two_rows, plain.transpose(2, 3)))


def test_copies_training_and_modules_of_other_kinds():
    module, other = attention_of("sinks"), nn.Linear(4, 4)
    quicken_attention(nn.ModuleList([module, other]))
    assert "forward" not in vars(other)
    twin = copy.deepcopy(module)
    twin.o_proj.weight.mul_(2)
    assert torch.equal(attend(twin, 9, "sinks"), attend(module, 9, "sinks") * 2)
    module.requires_grad_()
    attend(module, 9, "sinks").sum().backward()
    assert module.q_proj.weight.grad is not None

"""A model that is changed, compiled, copied or trained after loading does what the resident one does, or refuses."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from transformers import AutoModelForCausalLM, OlmoeConfig

import offload

IDS = torch.tensor([[7, 3, 11, 5, 2]])
LENGTHS = (5, 1, 3, 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "eos_token_id": None, "pad_token_id": 0}
    config = OlmoeConfig(**sizes, **heads, num_experts=8, num_experts_per_tok=2, initializer_range=0.2)
    path = tmp_path_factory.mktemp("model")
    AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(path)
    offload.write_pack(path, path / "experts", is_compressed=True)
    return path


def resident(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto")


@pytest.fixture(params=["plain", "compressed", "fast"])
def model(request, folder):
    pack = folder / "experts" if request.param == "compressed" else None
    arithmetic = "fast" if request.param == "fast" else "exact"
    found = offload.load(folder, cache_experts=3, pack=pack, arithmetic=arithmetic)
    yield found
    found.offload.close()


@pytest.fixture
def one_layer(folder, tmp_path):
    """The same model with its first layer only: compiling takes minutes otherwise."""
    small = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", num_hidden_layers=1)
    small.save_pretrained(tmp_path)
    found = offload.load(tmp_path, cache_experts=3)
    yield found
    found.offload.close()


def logits(model, length=5):
    with torch.no_grad():
        return model(IDS[:, :length], use_cache=False).logits


def test_compiled_calls_equal_plain_ones(one_layer):
    """A prompt and a token; each further length compiles once more."""
    check_compiled(one_layer, "eager", LENGTHS[:2])


@pytest.mark.slow
def test_compiled_calls_of_more_lengths_equal_plain_ones(one_layer):
    for backend in ("eager", "aot_eager"):
        check_compiled(one_layer, backend)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_calls_of_every_path_equal_plain_ones(model, backend):
    check_compiled(model, backend)


def check_compiled(model, backend, lengths=LENGTHS):
    compiled = torch.compile(model, backend=backend)
    for length in lengths:
        expected, found = logits(model, length), logits(compiled, length)
        torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)
        assert torch.equal(logits(model, length), expected)
    torch._dynamo.reset()


def test_layers_that_are_not_experts_compile_whole(folder):
    model = offload.load(folder, cache_experts=3)
    layer = model.model.layers[0]
    x_1D = torch.randn(1, 1, 64).bfloat16()
    for module in (layer.input_layernorm, layer.self_attn.q_proj, layer.mlp.gate):
        with torch.no_grad():
            expected = module(x_1D)
            found = torch.compile(module, backend="eager", fullgraph=True)(x_1D)
        torch.testing.assert_close(found, expected)
    torch._dynamo.reset()


def test_exporters_and_transforms_are_refused_or_right(folder):
    model = offload.load(folder, cache_experts=3)
    norm, linear = model.model.layers[0].input_layernorm, model.model.layers[0].self_attn.q_proj
    x_BD = torch.randn(4, 1, 64).bfloat16()
    for module in (norm, linear):
        with torch.no_grad():
            expected = torch.stack([module(x_1D) for x_1D in x_BD])
            torch.testing.assert_close(torch.vmap(module)(x_BD), expected, rtol=0.02, atol=0.02)
            exported = torch.export.export(module, (x_BD[0],)).module()
            torch.testing.assert_close(exported(x_BD[0]), expected[0], rtol=0.02, atol=0.02)
    with torch.no_grad(), pytest.raises(Exception, match=r"numbers in memory|data-dependent|disable"):
        torch.export.export(model, (IDS,), {"use_cache": False}, strict=False)
    hidden = torch.randn(3, 5, 64).bfloat16()
    experts = model.model.layers[0].mlp.experts
    ids, weights = torch.zeros(5, 2, dtype=torch.long), torch.ones(5, 2)
    with torch.no_grad(), pytest.raises(RuntimeError, match="numbers in memory"):
        torch.vmap(lambda x_TD: experts(x_TD, ids, weights))(hidden)
    assert torch.equal(logits(model), logits(resident(folder)))


@pytest.mark.filterwarnings("ignore")
def test_tracers_are_refused(model):
    """A trace of one token held memory that nothing had been written to."""

    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, ids):
            return self.model(ids, use_cache=False).logits

    for length in LENGTHS[:2]:
        expected = logits(model, length)
        with torch.no_grad(), pytest.raises(RuntimeError, match=r"cannot be recorded by torch\.jit\.trace"):
            torch.jit.trace(Logits(), (IDS[:, :length],), check_trace=False)
        with torch.no_grad(), pytest.raises(RuntimeError, match="make_fx"):
            make_fx(Logits())(IDS[:, :length])
        assert torch.equal(logits(model, length), expected)


def test_a_closed_model_says_so(folder):
    closed = offload.load(folder, cache_experts=2)
    closed.offload.close()
    closed.offload.close()
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"this model was closed .* load it again"):
        closed(IDS, use_cache=False)
    assert closed.offload.report()["misses"] >= 0


def test_a_closed_model_gives_its_slots_back_and_does_not_compute_with_them(folder):
    """A second load in the same process had no room before Python's collector ran."""
    closed = offload.load(folder, cache_experts=8)
    logits(closed, 5)
    memory = [slots.memory for slots in closed.offload._runtime.layers]
    assert any(bool(slots.any()) for slots in memory)
    closed.offload.close()
    assert not any(bool(slots.any()) for slots in memory)
    with torch.no_grad(), pytest.raises(RuntimeError, match="this model was closed"):
        closed(IDS[:, :5], use_cache=False)


def test_a_call_within_which_the_model_is_closed_fails(folder):
    """As by a signal handler: what had been looked up is zeros by then."""
    model = offload.load(folder, cache_experts=8)
    hook = model.model.layers[0].mlp.experts.register_forward_pre_hook(lambda *_: model.offload.close())
    with torch.no_grad(), pytest.raises(RuntimeError, match="this model was closed"):
        model(IDS, use_cache=False)
    hook.remove()


def test_gradients_through_experts_are_refused(folder):
    model = offload.load(folder, cache_experts=3)
    x = model.get_input_embeddings()(IDS).detach().requires_grad_(True)
    with pytest.raises(RuntimeError, match="gradients do not pass through offloaded experts"):
        model(inputs_embeds=x, labels=IDS, use_cache=False)
    with torch.no_grad():
        model(inputs_embeds=x, labels=IDS, use_cache=False)


def test_new_parameters_are_used(model, folder):
    other = resident(folder)
    for each in (model, other):
        layer = each.model.layers[0]
        torch.manual_seed(1)
        for module in (layer.input_layernorm, layer.self_attn.k_proj, layer.mlp.gate, each.lm_head):
            changed = torch.randn(module.weight.shape).mul_(0.2).bfloat16()
            module.weight = nn.Parameter(changed, requires_grad=False)
    for length in LENGTHS:
        tolerance = 0.05 if model.offload._runtime.matvecs.arithmetic == "fast" else 0.0
        torch.testing.assert_close(logits(model, length), logits(other, length), rtol=tolerance, atol=tolerance)


def test_a_parametrisation_is_used(folder):
    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    model, other = offload.load(folder, cache_experts=3), resident(folder).requires_grad_(False)
    for each in (model, other):
        nn.utils.parametrize.register_parametrization(each.model.layers[0].self_attn.v_proj, "weight", Doubled())
        nn.utils.parametrize.register_parametrization(each.model.norm, "weight", Doubled())
    for length in LENGTHS:
        assert torch.equal(logits(model, length), logits(other, length))


def test_another_dtype_is_refused(model):
    expected = logits(model)
    for change in (model.float, model.half, model.double):
        with pytest.raises(RuntimeError, match="load it again with dtype="):
            change()
    assert model.to("cpu") is model
    assert torch.equal(logits(model), expected)


def test_copies_share_their_experts(model):
    copied = copy.deepcopy(model)
    for length in LENGTHS:
        assert torch.equal(logits(copied, length), logits(model, length))


def test_what_would_leave_the_experts_out_is_refused(model, tmp_path):
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(model.offload._runtime)
    for refused in (model.state_dict, lambda: model.save_pretrained(tmp_path)):
        with pytest.raises(ValueError, match="no expert weights to save"):
            refused()
    with pytest.raises(RuntimeError, match="offload runtime only"):
        model.set_experts_implementation("eager")


def test_parameters_are_counted_with_the_experts(model, folder):
    assert model.num_parameters() == resident(folder).num_parameters()
    assert model.num_parameters(only_trainable=True) == 0


def test_training_mode_changes_what_it_changes_in_the_resident_model(model, folder):
    other = resident(folder).requires_grad_(False)
    model.train()
    other.train()
    tolerance = 0.05 if model.offload._runtime.matvecs.arithmetic == "fast" else 0.0
    torch.testing.assert_close(logits(model), logits(other), rtol=tolerance, atol=tolerance)

"""Layers, head and embedding that are read for every pass: the resident model's bits, whatever stays in memory."""

import copy
import itertools
import random
import signal
import threading
from collections import deque

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import offload
from offload.forecast.fit import fit
from offload.memory.budget import MIN_SLACK_BYTES, resident_bytes
from offload.store import store
from offload.window.guests import Guest, Guests
from offload.window.planning import plan_window, spread
from offload.window.ring import Ring
from tests.test_offload_runtime_families import _small_config

IDS = torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(2))
DTYPES = {"qwen2": torch.float32}
TIED = ("gemma2",)
BLT_PART = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
BLT_PARTS = dict.fromkeys(("patcher_config", "encoder_config", "global_config"), BLT_PART)
OWN_SIZES = {
    "blt": {**BLT_PARTS, "decoder_config": BLT_PART | {"hidden_size_global": 64}, "encoder_hash_byte_group_vocab": 500}
}
IN_MEMORY = ("rwkv",)
"""Divides its own weights in its forward pass."""


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folder, the resident model's logits and its tokens, by family."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    kept = {}

    def of(model_type):
        if model_type not in kept:
            folder = tmp_path_factory.mktemp(model_type)
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(_small_config(model_type))
            model.to(DTYPES.get(model_type, torch.bfloat16)).save_pretrained(folder)
            resident = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
            kept[model_type] = folder, logits(resident), tokens(resident)
        return kept[model_type]

    return of


def logits(model):
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


def tokens(model):
    return model.generate(IDS, max_new_tokens=4, do_sample=False, pad_token_id=0)


def window_of(model):
    return model.offload.report()["window"]


@pytest.mark.parametrize(
    ("model_type", "resident_layers", "layers_ahead", "io"),
    [
        ("llama", 0, 0, "cached"),
        ("llama", 0, 1, "direct"),
        ("llama", 2, None, "cached"),
        ("qwen2", 0, 2, "direct"),
        ("qwen3", 1, 9, "cached"),
        ("gemma2", 0, 1, "direct"),
        ("gemma2", 1, 0, "cached"),
        ("olmoe", 0, 1, "direct"),
        ("biogpt", 0, 1, "cached"),  # its table of positions computes the rows that it looks up
    ],
)
def test_bits_and_tokens_are_the_resident_models(saved, model_type, resident_layers, layers_ahead, io):
    folder, expected, expected_ids = saved(model_type)
    slots = {"cache_experts": 2} if model_type == "olmoe" else {}
    model = offload.load(folder, resident_layers=resident_layers, layers_ahead=layers_ahead, io=io, **slots)
    for _ in range(2):
        assert torch.equal(logits(model), expected)
    assert torch.equal(tokens(model), expected_ids)
    found = window_of(model)
    assert found["streamed_layers"] == 4 - resident_layers
    assert found["entered"] == 6 * found["streamed_layers"]
    assert found["restarts"] == 0
    # each pass reads what is streamed once, but for what is on its way to the next one
    read = found["bytes_read"] - (found["rows_read"] * 64 * expected.element_size())
    assert 6 <= read / found["pass_bytes"] <= 7
    assert (found["rows"] == 0) == (model_type in TIED and resident_layers > 0)
    assert model.offload.report()["bytes_read"] >= found["bytes_read"]
    model.offload.close()


def test_layers_are_streamed_beside_a_packed_copy_of_the_experts(saved, tmp_path):
    folder, expected, _ = saved("olmoe")
    pack = offload.write_pack(folder, tmp_path / "experts.pack")
    model = offload.load(folder, pack=pack, resident_layers=0, cache_experts=2)
    assert torch.equal(logits(model), expected)
    assert window_of(model)["streamed_layers"] == 4
    model.offload.close()


def test_everything_in_memory_if_it_fits_or_is_told_to_stay(saved):
    folder, expected, _ = saved("llama")
    for asked in ({}, {"resident_layers": 4}):
        model = offload.load(folder, **asked)
        assert torch.equal(logits(model), expected)
        assert "window" not in model.offload.report()
        model.offload.close()


def test_another_dtype_than_the_files(saved):
    folder, *_ = saved("llama")
    resident = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model = offload.load(folder, resident_layers=0, dtype="float32")
    assert torch.equal(logits(model), logits(resident))
    assert window_of(model)["rows"] == 0  # rows are not converted one by one: the table stays
    model.offload.close()


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A model whose layers weigh more than what the process grows by, and the resident model's logits."""
    folder = tmp_path_factory.mktemp("large")
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 4096, "num_hidden_layers": 12, "vocab_size": 8192}
    AutoModelForCausalLM.from_config(_small_config("llama", sizes), dtype=torch.bfloat16).save_pretrained(folder)
    return folder, logits(AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval())


def test_budgets_down_to_one_layer(large):
    """What is streamed follows from the budget, is counted in it, and `fit` foretells it."""
    folder, expected = large
    fit(folder, context=64)  # imports the family's code, which the process then holds
    weights, most = fit(folder, context=64).dense_bytes, 0
    for share in (0.02, 0.5, 0.9):
        budgets = fit(folder, context=64).budgets  # anew: the process keeps a little of each model
        assert budgets.all_bytes - budgets.least_bytes > 0.8 * weights
        limit = int(budgets.least_bytes + share * (budgets.all_bytes - budgets.least_bytes))
        foretold = fit(folder, context=64, cpu_memory=limit)
        model = offload.load(folder, context=64, cpu_memory=limit)
        assert torch.equal(logits(model), expected)
        found, memory = window_of(model), model.offload.report()["memory"]
        assert found["resident_layers"] >= most
        assert abs(found["resident_layers"] - foretold.window.num_resident) <= 1
        most = found["resident_layers"]
        parts = sum(size for name, size in memory.items() if name.endswith("_bytes") and name != "limit_bytes")
        assert parts <= limit
        assert memory["weight_bytes"] + memory["window_bytes"] < weights
        assert memory["slack_bytes"] >= MIN_SLACK_BYTES
        model.offload.close()
    assert 5 < most < 13
    with pytest.raises(ValueError, match=r"too small for a dense model's layers .* give at least"):
        offload.load(folder, context=64, cpu_memory=budgets.least_bytes - (16 << 20))


def test_closing_gives_the_memory_back_at_once(large):
    model = offload.load(large[0], context=64, resident_layers=0, layers_ahead=12)
    logits(model)
    window, before = model.offload.report()["window"], resident_bytes()
    assert window["memory_bytes"] > 60 << 20
    model.offload.close()
    assert before - resident_bytes() > 0.95 * window["memory_bytes"]


def test_reads_run_while_a_layer_computes(saved):
    folder, *_ = saved("llama")
    model = offload.load(folder, resident_layers=0, layers_ahead=2)
    window, seen = model.offload.runtime.window, []
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda *_: seen.append([held.number for held in window._held]))
    logits(model)
    assert seen == [[0, 1, 2], [1, 2, 3], [2, 3, 0]]
    assert window._held[0].number == 0  # of the next pass
    model.offload.close()


class Stop(BaseException):
    """What a timer or Ctrl-C raises."""


# a callback of the collector may be what is interrupted, and cannot pass the exception on
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_interrupts_between_and_within_layers(saved):
    folder, expected, _ = saved("llama")
    model, chance, cut = offload.load(folder, resident_layers=0, layers_ahead=1, io="cached"), random.Random(3), 0

    def stop(*_):
        raise Stop

    before = signal.signal(signal.SIGALRM, stop)
    for _ in range(25):
        try:
            signal.setitimer(signal.ITIMER_REAL, chance.uniform(1e-4, 6e-3))
            logits(model)
        except Stop:
            cut += 1
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        assert torch.equal(logits(model), expected)
    signal.signal(signal.SIGALRM, before)
    assert cut > 3
    model.offload.close()


def test_layers_left_out_start_the_window_anew(saved):
    folder, expected, _ = saved("llama")
    model = offload.load(folder, resident_layers=0, layers_ahead=2)
    logits(model)
    with torch.no_grad():
        model.model.layers[2](
            torch.zeros(1, 3, 64).bfloat16(), position_embeddings=[torch.zeros(1, 3, 16).bfloat16()] * 2
        )
    assert torch.equal(logits(model), expected)
    assert window_of(model)["restarts"] == 2
    model.offload.close()


def test_a_call_within_a_layer_is_refused_and_the_next_one_is_right(saved):
    folder, expected, _ = saved("llama")
    model = offload.load(folder, resident_layers=0)

    def call_again(*_):
        handle.remove()
        logits(model)

    handle = model.model.layers[1].mlp.register_forward_pre_hook(call_again)
    with pytest.raises(RuntimeError, match="called within a layer of another"):
        logits(model)
    assert torch.equal(logits(model), expected)
    model.offload.close()


def test_two_threads_at_once(saved):
    folder, expected, _ = saved("llama")
    model, found = offload.load(folder, resident_layers=0), []
    threads = [threading.Thread(target=lambda: found.append(logits(model))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [torch.equal(one, expected) for one in found] == [True, True]
    model.offload.close()


def test_what_a_streamed_model_refuses(saved):
    folder, *_ = saved("llama")
    model = offload.load(folder, resident_layers=1)
    assert model.num_parameters() == AutoModelForCausalLM.from_pretrained(folder).num_parameters()
    with pytest.raises(ValueError, match="no streamed weights to save"):
        model.save_pretrained(folder / "copy")
    with pytest.raises(TypeError, match="load it again instead of copying"):
        copy.deepcopy(model)
    with pytest.raises(IndexError, match="ids must be 0 to 95; got 7 to 96"):
        model(torch.tensor([[7, 96]]))
    embedded = torch.zeros(1, 3, 64, dtype=torch.bfloat16, requires_grad=True)
    with pytest.raises(RuntimeError, match="gradients do not pass through streamed layers"):
        model(inputs_embeds=embedded)
    for asked in ({"resident_layers": -1}, {"layers_ahead": -2}):
        with pytest.raises(ValueError, match="must be 0 or more"):
            offload.load(folder, **asked)
    model.offload.close()
    with pytest.raises(RuntimeError, match="this model was closed"):
        logits(model)


def test_a_failing_read_names_the_layer_and_the_next_call_reads_again(saved, monkeypatch):
    folder, expected, _ = saved("llama")
    model, read, broken = offload.load(folder, resident_layers=0, io="cached"), store.read_into, [True]

    def fail(*arguments):
        if broken:
            raise OSError("the disk is gone")
        return read(*arguments)

    monkeypatch.setattr(store, "read_into", fail)
    with pytest.raises(OSError, match=r"reading model\.embed_tokens failed: the disk is gone"):
        logits(model)
    broken.clear()
    assert torch.equal(logits(model), expected)
    model.offload.close()


def guest_of(blocks):
    class Form:
        expert_bytes, slot_bytes = blocks * 4096 - 100, blocks * 4096
        layer = type("Layer", (), {"num_experts": 1})

    return Guest(f"g{blocks}", Form(), frozenset({f"g{blocks}"}))


def test_a_plan_fits_its_room_and_more_room_streams_less():
    layers, head = tuple(guest_of(10) for _ in range(8)), guest_of(25)
    guests = Guests(layers=layers, head=head)
    assert plan_window(guests, guests.nbytes) is None
    # one block less than all: of ten layers in memory two go, and two of ten blocks are the window
    before = 10**9
    for blocks in range(25, 106):
        plan = plan_window(guests, blocks * 4096)
        if plan is None:
            continue
        assert guests.nbytes - plan.saved_bytes + plan.nbytes <= blocks * 4096
        assert plan.pass_bytes <= before
        before = plan.pass_bytes
    tight = plan_window(guests, 25 * 4096)
    assert (tight.num_resident, tight.ahead) == (0, 0)
    assert plan_window(guests, 4 * 4096).nbytes == 25 * 4096  # the smallest, though it does not fit


def test_what_stays_is_spread_evenly():
    layers = [guest_of(1 + number) for number in range(8)]
    for count in range(9):
        streamed = [layers.index(layer) for layer in spread(layers, count)]
        assert len(streamed) == count
        gaps = [after - before for before, after in itertools.pairwise(streamed)]
        assert not gaps or max(gaps) - min(gaps) <= 1


def test_a_ring_never_gives_memory_twice():
    chance = random.Random(0)
    for _ in range(200):
        size = chance.randint(1, 12)
        ring, taken = Ring(size), deque()
        for _ in range(60):
            if taken and chance.random() < 0.5:
                ring.give_back()
                taken.popleft()
                continue
            count = chance.randint(1, size)
            start = ring.take(count)
            if start is None:
                assert taken, "an empty ring holds anything of its size"
                continue
            place = set(range(start, start + count))
            assert max(place) < size
            assert not any(place & other for other in taken)
            taken.append(place)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_type", sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
def test_every_family(model_type, tmp_path):
    """Whatever causal language model transformers has: nothing stays, and no bit changes."""
    torch.set_num_threads(1)
    try:
        torch.manual_seed(0)
        config = _small_config(model_type, OWN_SIZES.get(model_type, ()))
        AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(tmp_path)
        resident = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").eval()
        expected = logits(resident)
    except Exception as error:
        pytest.skip(f"the generic small configuration does not make one that transformers loads: {error}")
    if not expected.isfinite().all():
        pytest.skip("not a number with random weights")
    # `auto` may promise other bits than the resident model's, where feed-forwards are as wide as by default
    streamed = offload.load(tmp_path, resident_layers=0, arithmetic="exact")
    assert ("window" in streamed.offload.report()) == (model_type not in IN_MEMORY)
    assert torch.equal(logits(streamed), expected)
    streamed.offload.close()

"""Shared fixtures: quiet libraries, tolerances, tiny models."""

import gc
import importlib
import logging
import math
import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
if not any(os.path.exists(device) for device in ("/dev/nvidiactl", "/dev/kfd")):
    # without a GPU kernels run in Triton's interpreter; it must be told before anything imports triton
    os.environ.setdefault("TRITON_INTERPRET", "1")
# XLA compiles each test's few operations for longer than they run
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
# each HTTP client reads the certificates of the world, though tests talk to this machine alone and without them
os.environ.pop("SSL_CERT_FILE", None)
os.environ["SSL_CERT_DIR"] = os.path.dirname(__file__)

import numpy as np
import pytest
import torch

TOLERANCES = {
    torch.float64: {"atol": 1e-10, "rtol": 1e-8},
    torch.float32: {"atol": 1e-5, "rtol": 1e-4},
    # half an ulp of bfloat16 is 2**-9 of the value; sums of a few such terms
    torch.bfloat16: {"atol": 2e-2, "rtol": 2e-2},
    torch.float16: {"atol": 4e-3, "rtol": 4e-3},
}
GUARD_NUMBER = 123


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """What modules and tests are made of stays to the end: Python's collector need not look through it at all."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.fixture
def tolerance():
    """The one tolerance table, by dtype; never relaxed without a written reason."""
    return TOLERANCES


@pytest.fixture
def several_threads():
    """A function that sets the number of torch's threads, which is what it was afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="session")
def _language_patched_once():
    """Triton's interpreter patches its language for a kernel, and once more for each function that the kernel calls.

    Only the first time for a module changes anything; the others are a third of the time of the kernels' tests.
    """
    interpreter = sys.modules.get("triton.runtime.interpreter")
    if interpreter is None:
        yield
        return
    patched = set()

    def call(function, *arguments, **named):
        module = function.fn.__module__
        if module not in patched:
            interpreter._patch_lang(function.fn)
            patched.add(module)
        try:
            return function.rewrite()(*arguments, **named)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpretedFunction, "__call__", call)
        yield


@pytest.fixture(autouse=True)
def _seed():
    # without a device, `torch.manual_seed` notes the whole stack of calls for each kind of device that may yet come
    (torch.manual_seed if torch.accelerator.is_available() else torch.default_generator.manual_seed)(0)


# imported when a test wants them: each takes longer than a hundred test files, and every worker collects all files
@pytest.fixture(scope="session")
def openai():
    """The `openai` package."""
    return importlib.import_module("openai")


@pytest.fixture(scope="session")
def anthropic():
    """The `anthropic` package."""
    return importlib.import_module("anthropic")


@pytest.fixture
def logged():
    """The records of what is logged; pytest's own plugin goes through all loggers six times for each test."""
    records, handler = [], logging.Handler()
    handler.emit = records.append
    logging.getLogger().addHandler(handler)
    yield records
    logging.getLogger().removeHandler(handler)


@pytest.fixture
def run(monkeypatch):
    """`expertier` with these arguments, in this process; gives its exit code."""
    from experiments import cli

    def call(*arguments):
        monkeypatch.setattr("sys.argv", ["expertier", *map(str, arguments)])
        with pytest.raises(SystemExit) as finished:
            cli.main()
        return finished.value.code or 0

    return call


@pytest.fixture
def tiny_config():
    """A function from overrides to a MoEConfig that builds in milliseconds."""
    from moe import MoEConfig

    def build(**overrides):
        sizes = {
            "vocab_size": 96,
            "hidden_size": 32,
            "intermediate_size": 48,
            "moe_intermediate_size": 24,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "initializer_range": 0.2,
        }
        return MoEConfig(**(sizes | overrides))

    return build


@pytest.fixture
def tiny_training():
    """Eight steps of training that touch everything: accumulation, warm-up, evaluation, checkpoints."""
    from experiments.train.presets import TrainConfig

    return TrainConfig(
        model={
            "vocab_size": 32,
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 8,
            "num_experts": 4,
            "moe_intermediate_size": 8,
            "router": "switch",
        },
        steps=8,
        batch_size=4,
        sequence_length=16,
        accumulation=2,
        warmup_steps=2,
        evaluate_every=4,
        checkpoint_every=3,
        precision="float32",
    )


@pytest.fixture
def corpus():
    """Random tokens of the vocabulary of `tiny_training`."""
    from experiments.train.corpus import Corpus

    tokens = np.random.default_rng(0).integers(0, 32, 4_000).astype(np.uint8)
    return Corpus(train=tokens[:3_500], held_out=tokens[3_500:], vocab_size=32, tokens_per_byte=1.0, source="random")


@pytest.fixture
def guarded_memory(monkeypatch):
    """New tensors start as NaN between two guard zones; a write outside of a tensor fails the test."""
    guard = 64
    made = []
    allocate = torch.empty

    def surround(size, dtype, device):
        numel = math.prod(size)
        flat = allocate(numel + 2 * guard, dtype=dtype, device=device)
        flat.fill_(float("nan") if dtype.is_floating_point else GUARD_NUMBER)
        made.append((flat, numel))
        return flat[guard : guard + numel]

    def empty(*size, dtype=None, device=None, **others):
        size = size[0] if size and not isinstance(size[0], int) else size
        if others or str(device) == "meta":
            return allocate(*size, dtype=dtype, device=device, **others)
        return surround(size, dtype or torch.get_default_dtype(), device).view(tuple(size))

    def new_empty(self, *size, dtype=None, **_):
        return empty(*size, dtype=dtype or self.dtype, device=self.device)

    def empty_like(self, **_):
        return surround(self.shape, self.dtype, self.device).as_strided(self.shape, self.stride())

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch, "empty_like", empty_like)
    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    yield
    monkeypatch.undo()
    assert made, "nothing was allocated"
    for flat, numel in made:
        zones = torch.cat([flat[:guard], flat[guard + numel :]])
        is_intact = zones.isnan() if flat.is_floating_point() else zones == GUARD_NUMBER
        assert is_intact.all(), f"a kernel wrote outside of a tensor of {numel} elements"

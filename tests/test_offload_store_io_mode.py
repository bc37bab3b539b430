"""When the page cache is used: not for models that are larger than memory, nor for one whose slots hold everything."""

import os

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, OlmoeConfig

import offload
from offload.formats.plain import PlainForm
from offload.store import io_mode


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    folder = tmp_path_factory.mktemp("io") / "model"
    config = OlmoeConfig(
        vocab_size=64, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_experts=16, num_experts_per_tok=2, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def _forget(folder):
    for file in folder.glob("*.safetensors"):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def _is_direct(folder, **options):
    model = offload.load(folder, **options)
    try:
        assert torch.isfinite(model(torch.arange(5)[None]).logits).all()
        return model.offload.report()["is_direct"]
    finally:
        model.offload.close()


@pytest.fixture
def records(folder):
    from offload.checkpoint.model_folder import skeleton_of

    return [PlainForm(layer) for layer in skeleton_of(folder)[2]]


def test_files_that_are_cached_are_read_from_there(folder, records):
    for file in folder.glob("*.safetensors"):
        file.read_bytes()
    if not io_mode.cached_share(records):
        pytest.skip("this kernel or file system does not say what is cached")
    assert io_mode.cached_share(records) == 1
    assert not _is_direct(folder)


def test_files_that_are_not_cached_go_past_the_cache_if_the_slots_hold_everything(folder, records):
    if not io_mode._reads_direct(records[0]):
        pytest.skip("this file system does not know O_DIRECT")
    _forget(folder)
    if io_mode.cached_share(records) >= 0.5:
        pytest.skip("this file system keeps its pages")
    _forget(folder)  # asking makes the kernel read ahead
    assert _is_direct(folder)
    assert not _is_direct(folder, cache_experts=3)
    assert not _is_direct(folder, io="cached")


def test_a_file_system_without_direct_reads_is_read_through_the_cache(folder, monkeypatch):
    monkeypatch.setattr(io_mode, "_reads_direct", lambda record: False)
    assert not _is_direct(folder)


def test_an_unknown_mode_is_refused(folder):
    with pytest.raises(ValueError, match="one of auto, direct, cached; got 'fast'"):
        offload.load(folder, io="fast")

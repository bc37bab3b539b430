"""Training in JAX on two processes: the losses of one, and checkpoints that are the same files."""

import socket

import numpy as np
import pytest

pytest.importorskip("jax", reason="needs the extra expertier[jax]")

from safetensors.numpy import load_file

from tests.jax_ranks import MESHES, losses_of, pipeline_of
from tests.rank_processes import run_ranks


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@pytest.mark.slow
def test_two_processes_train_as_one_and_save_what_one_saves(tmp_path, subtests):
    alone = losses_of(None, tmp_path / "alone")
    both = run_ranks(2, "jax_ranks", str(tmp_path), str(free_port()))
    with subtests.test("a model of one's own"):
        np.testing.assert_allclose(both["pipeline"], pipeline_of(None, tmp_path / "own"), rtol=1e-5)
        ours, right = (load_file(tmp_path / name / "pipeline.safetensors") for name in ("pipeline", "own"))
        assert ours.keys() == right.keys()
        assert all(np.allclose(ours[key], tensor, rtol=1e-4, atol=1e-6) for key, tensor in right.items())
    for mesh in MESHES:
        np.testing.assert_allclose(both[mesh], alone, rtol=1e-6)
        for name in ("model.safetensors", "training_state.safetensors"):
            ours, right = load_file(tmp_path / mesh / name), load_file(tmp_path / "alone" / name)
            assert ours.keys() == right.keys()
            for key, tensor in right.items():
                assert ours[key].dtype == tensor.dtype
                np.testing.assert_allclose(ours[key], tensor, rtol=1e-4, atol=1e-6)
        assert (tmp_path / mesh / "config.json").read_text() == (tmp_path / "alone" / "config.json").read_text()

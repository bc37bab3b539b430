import json
import os
import signal
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from routing import RoutingTrace
from routing.ground.files import (
    atomic_write,
)
from routing.traces import (
    coactivation_EE,
    entropy_L,
    load_LE,
    reuse_distance_TK,
    skew_L,
    transition_EE,
)


def make_trace(expert_TLK, **fields):
    expert_TLK = np.asarray(expert_TLK, np.int16)
    return RoutingTrace(expert_TLK=expert_TLK, sequence_T=np.zeros(len(expert_TLK), np.int32), **fields)


# 3 tokens, 2 layers, top-2, 4 experts; the second slot of token 2 at layer 0 is empty
TINY = make_trace([[[0, 1], [2, 3]], [[0, 2], [2, 0]], [[1, -1], [3, 0]]], metadata={"num_experts": 4})


@given(
    expert_TLK=hnp.arrays(
        np.int16, st.tuples(st.integers(0, 9), st.integers(1, 3), st.integers(1, 4)), elements=st.integers(-1, 7)
    ),
    with_weights=st.booleans(),
)
@settings(deadline=None, max_examples=30)
def test_a_saved_trace_loads_as_it_was(tmp_path_factory, expert_TLK, with_weights):
    path = tmp_path_factory.mktemp("trace") / "trace.npz"
    trace = make_trace(
        expert_TLK,
        weight_TLK=np.ones(expert_TLK.shape, np.float16) if with_weights else None,
        metadata={"num_experts": 8, "model": "tiny"},
    )
    trace.save(path)
    loaded = RoutingTrace.load(path)
    np.testing.assert_array_equal(trace.expert_TLK, loaded.expert_TLK)
    np.testing.assert_array_equal(trace.sequence_T, loaded.sequence_T)
    assert (loaded.weight_TLK is not None) == with_weights
    assert loaded.metadata == {"num_experts": 8, "model": "tiny"}


def test_a_file_with_only_experts_and_sequences_is_valid_and_other_keys_are_left_alone(tmp_path):
    np.savez(
        tmp_path / "t.npz", expert_TLK=TINY.expert_TLK.astype(np.int8), sequence_T=TINY.sequence_T, domain_T=[1, 2]
    )
    loaded = RoutingTrace.load(tmp_path / "t.npz")
    assert loaded.num_experts == 4
    np.testing.assert_array_equal(loaded.expert_TLK, TINY.expert_TLK)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"expert_TLK": np.full((2, 1, 1), 9, np.int16), "metadata": np.array('{"num_experts": 4}')}, "0*9"),
        ({"expert_TLK": np.full((2, 1, 1), -2, np.int16)}, "-2"),
        ({"expert_TLK": np.zeros((2, 1), np.int16)}, "3 dimensions"),
        ({"expert_TLK": np.zeros((2, 1, 1), np.float32)}, "integer"),
        ({"expert_TLK": np.zeros((3, 1, 1), np.int16)}, "sequence_T must have shape"),
        ({"expert_TLK": np.zeros((2, 0, 1), np.int16)}, "at least one layer"),
        ({"expert_TLK": np.zeros((2, 1, 1), np.int16), "metadata": np.array("[1]")}, "JSON object"),
        ({"expert_TLK": np.zeros((2, 1, 1), np.int16), "metadata": np.array('{"num_experts": -3}')}, "num_experts"),
        ({"expert_TLK": np.zeros((2, 1, 1), np.int16), "weight_TLK": np.zeros((2, 1, 2))}, "weight_TLK"),
        ({}, "missing keys"),
    ],
)
def test_a_bad_trace_is_refused_with_its_reason(tmp_path, arrays, message):
    np.savez(tmp_path / "bad.npz", sequence_T=np.zeros(2, np.int32), **arrays)
    with pytest.raises(ValueError, match=message) as error:
        RoutingTrace.load(tmp_path / "bad.npz")
    assert "bad.npz" in str(error.value)


def test_pickled_arrays_and_truncated_files_are_refused(tmp_path):
    np.savez(tmp_path / "pickle.npz", expert_TLK=np.array([{}]), sequence_T=np.zeros(1, np.int32))
    with pytest.raises(ValueError, match="not a readable"):
        RoutingTrace.load(tmp_path / "pickle.npz")
    TINY.save(tmp_path / "good.npz")
    whole = (tmp_path / "good.npz").read_bytes()
    (tmp_path / "torn.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="not a readable"):
        RoutingTrace.load(tmp_path / "torn.npz")


def test_a_header_that_promises_too_much_is_refused_before_reading(tmp_path):
    header = {"descr": "<i2", "fortran_order": False, "shape": (1 << 40, 1, 1)}
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w") as archive:
        with archive.open("expert_TLK.npy", "w") as file:
            np.lib.format.write_array_header_1_0(file, header)
        with archive.open("sequence_T.npy", "w") as file:
            np.lib.format.write_array(file, np.zeros(1, np.int32))
    with pytest.raises(ValueError, match="at most"):
        RoutingTrace.load(tmp_path / "bomb.npz")


def test_statistics_of_a_tiny_trace_by_hand():
    np.testing.assert_array_equal(load_LE(TINY), [[2, 2, 1, 0], [2, 0, 2, 2]])
    np.testing.assert_allclose(skew_L(load_LE(TINY)), [2 / 1.25, 2 / 1.5])
    np.testing.assert_allclose(entropy_L(np.array([[1, 1, 1, 1], [4, 0, 0, 0]])), [1.0, 0.0], atol=1e-12)
    np.testing.assert_array_equal(coactivation_EE(TINY, 0), [[2, 1, 1, 0], [1, 2, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]])
    np.testing.assert_array_equal(transition_EE(TINY, 0), [[1, 0, 2, 1], [1, 0, 1, 2], [1, 0, 1, 0], [0, 0, 0, 0]])
    with pytest.raises(ValueError, match="got layer 1"):
        transition_EE(TINY, 1)


def test_reuse_distance_by_hand():
    # recency after token 0: [1, 0]; after token 1 (0 then 2): [2, 0, 1]
    np.testing.assert_array_equal(reuse_distance_TK(TINY, 0), [[-1, -1], [1, -1], [2, -1]])


def test_rows_keep_the_number_of_experts():
    part = TINY.rows(2)
    assert (part.num_tokens, part.num_experts) == (1, 4)


def test_atomic_write_leaves_nothing_behind_on_error(tmp_path):
    def write_half():
        with atomic_write(tmp_path / "file.txt") as file:
            file.write("half")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError):
        write_half()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="does not exist"), atomic_write(tmp_path / "no" / "file"):
        pass


def test_a_kill_while_saving_leaves_the_old_file(tmp_path):
    path = tmp_path / "trace.npz"
    TINY.save(path)
    program = f"""
import numpy as np
from routing import RoutingTrace
trace = RoutingTrace(expert_TLK=np.random.randint(0, 32, (400_000, 8, 4)).astype(np.int16),
                     sequence_T=np.zeros(400_000, np.int32))
print("ready", flush=True)
trace.save({str(path)!r})
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, cwd=os.getcwd())
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert RoutingTrace.load(path).num_tokens == 3


def test_metadata_is_a_json_string(tmp_path):
    TINY.save(tmp_path / "t.npz")
    with np.load(tmp_path / "t.npz", allow_pickle=False) as archive:
        assert set(archive) == {"expert_TLK", "sequence_T", "metadata"}
        assert json.loads(str(archive["metadata"])) == {"num_experts": 4}

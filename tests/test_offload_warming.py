"""While experts are on their way the next weights are read: which, in which order and pieces, until one has landed."""

from queue import SimpleQueue

import torch
from torch import nn

from offload.matvec import touch
from offload.step import ExpertStep
from offload.warming import PIECE_BYTES, Warmer


class Experts(nn.Module):
    has_gate = has_bias = is_transposed = is_concatenated = False


def model_of(num_layers):
    layers = [nn.ModuleDict({"attention": nn.Linear(4, 4), "experts": Experts()}) for _ in range(num_layers)]
    return nn.ModuleDict({"embedding": nn.Embedding(3, 4), "layers": nn.ModuleList(layers), "head": nn.Linear(4, 3)})


def test_each_layer_is_followed_by_the_next_and_the_last_by_head_and_first():
    model, read = model_of(3), []
    warmer = Warmer(model, lambda start, size: read.append((start, size)))
    expected = [[model["layers"][1]["attention"]], [model["layers"][2]["attention"]]]
    expected.append([model["head"], model["layers"][0]["attention"]])
    for layer, linears in enumerate(expected):
        read.clear()
        assert sum(warmer.pieces(layer)) == sum(linear.weight.nbytes for linear in linears)
        assert read == [(linear.weight.data_ptr(), linear.weight.nbytes) for linear in linears]


def test_a_large_weight_is_read_in_pieces_that_cover_it():
    model = nn.Sequential(Experts(), nn.Linear(1024, 700))
    weight, read = model[1].weight, []
    pieces = Warmer(model, lambda start, size: read.append((start, size))).pieces(0)
    next(pieces)
    assert read == [(weight.data_ptr(), PIECE_BYTES)]
    list(pieces)
    assert [start for start, _ in read] == [weight.data_ptr() + number * PIECE_BYTES for number in range(len(read))]
    assert sum(size for _, size in read) == weight.nbytes


def test_reading_itself_stays_within_bounds():
    read = touch()
    if read is not None:
        data = torch.zeros(3 << 20, dtype=torch.uint8)
        read(data.data_ptr(), data.nbytes)


def test_idle_work_stops_when_an_expert_lands():
    class Ticket:
        expert, error = 7, None

    done = []

    def work(landed):
        for number in range(100):
            done.append(number)
            if number == 3:
                landed.put(Ticket())
            yield number

    class Counters:
        stall_s = 0.0

    step = ExpertStep.__new__(ExpertStep)
    step._landed, step._in_flight, step._counters = SimpleQueue(), {7: Ticket()}, Counters()
    step._idle_work = work(step._landed)
    assert step._next_landed() == 7
    assert done == [0, 1, 2, 3]

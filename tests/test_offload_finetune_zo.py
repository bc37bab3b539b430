"""Forward-only fine-tuning: bit-equal to the same method on a resident model, at every number of slots."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import offload
from experiments.evidence.resident import load_resident
from offload.checkpoint.model_folder import skeleton_of
from offload.finetune.examples import NO_LOSS
from offload.finetune.methods import directions
from offload.finetune.methods.directions import Direction, moved, perturbed, visit
from offload.finetune.methods.forward_only import RESIDENT, ForwardOnly
from offload.finetune.run import read_log
from offload.formats.catalogue import form_in_place
from tests.small_tuning import LENGTH, rows_of, save_examples, save_model

OPTIONS = offload.TuneOptions(
    method="zo", steps=3, sequence_length=LENGTH, batch_size=2, accumulation=2, learning_rate=1e-3, checkpoint_every=2
)
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(
    scope="module",
    params=[torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.slow)],
    ids=["bfloat16", "float32"],
)
def folder(request, tmp_path_factory):
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("zo")
    save_model(path / "model", request.param)
    save_examples(path / "data.jsonl")
    return path


def tune(folder, name, options=OPTIONS, **changes):
    return offload.fine_tune(folder / "model", folder / "data.jsonl", folder / name, options, **changes)


def weights_of(out):
    return {key: value for file in sorted(out.glob("*.safetensors")) for key, value in load_file(file).items()}


class ResidentZo:
    """The same method, written for a model that is in memory: every expert is perturbed, the touched ones move."""

    def __init__(self, folder, options):
        self.model, self.options = load_resident(folder / "model"), options
        self.rows = rows_of(folder / "model", folder / "data.jsonl")
        layers = skeleton_of(folder / "model")[2]
        self.order_L = [[parameter.full_name for parameter in form_in_place(layer).parameters] for layer in layers]
        named = dict(self.model.named_parameters())
        self.experts = [[named.pop(name) for name in order] for order in self.order_L]
        self.resident = list(named.values())
        self.touched = [set() for _ in layers]
        for layer, names in enumerate(self.order_L):
            module = self.model.get_submodule(names[0].rsplit(".", 1)[0])
            module.register_forward_pre_hook(
                lambda _, args, layer=layer: self.touched[layer].update(args[1].unique().tolist())
            )

    def owners(self):
        """Every group of weights with one direction: its seeds and the tensors."""
        for number, parameter in enumerate(self.resident):
            yield (RESIDENT, number), [parameter.data]
        for layer, matrices in enumerate(self.experts):
            for expert in range(len(matrices[0])):
                yield (layer + 1, expert), [matrix.data[expert] for matrix in matrices]

    @torch.no_grad()
    def loss(self, batches, num_learnt):
        total = 0.0
        for ids, labels in batches:
            logits = self.model(ids, use_cache=False).logits[:, :-1].float().flatten(0, 1)
            total += float(
                torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / num_learnt
            )
        return total

    def step(self, number):
        options = self.options
        batches = [
            self.rows.batch(number, micro, options.accumulation, options.batch_size, options.seed) for micro in (0, 1)
        ]
        num_learnt = sum(int((labels[:, 1:] != NO_LOSS).sum()) for _, labels in batches)
        before = [[tensor.clone() for tensor in tensors] for _, tensors in self.owners()]
        losses = []
        for found in self.touched:
            found.clear()
        for epsilon in (options.epsilon, -options.epsilon):
            for (owner, tensors), olds in zip(self.owners(), before, strict=True):
                direction = Direction(options.seed, number + 1, owner)
                for tensor, old in zip(tensors, olds, strict=True):
                    tensor.copy_(perturbed(old, direction.of(old), epsilon))
            losses.append(self.loss(batches, num_learnt))
        size = options.rate_at(number + 1) * (losses[0] - losses[1]) / (2 * options.epsilon)
        for (owner, tensors), olds in zip(self.owners(), before, strict=True):
            is_touched = owner[0] == RESIDENT or owner[1] in self.touched[owner[0] - 1]
            news = moved(olds, Direction(options.seed, number + 1, owner), size) if is_touched else olds
            for tensor, new in zip(tensors, news, strict=True):
                tensor.copy_(new)
        return sum(losses) / 2


@pytest.mark.parametrize("size", [1e-3, 3e-8, 7.0, 0.0])
def test_a_visit_in_c_has_the_bits_of_torch(size, monkeypatch):
    """Of numbers of all magnitudes, and in numbers that fill no vector, no piece and no block."""
    generator = torch.Generator().manual_seed(0)
    weights = [
        torch.randn(count, generator=generator).mul(10.0**power).bfloat16()
        for power, count in ((-30, 7), (-3, 1000), (0, 641), (3, 33), (-1, directions.BLOCK + 515))
    ]
    weights[0][0] = 0.0

    def rooms():
        return [torch.empty_like(weight) for weight in weights]

    def visited():
        moves = [(Direction(5, step, (1, 3)), size * step) for step in (1, 2)]
        slot, copies, sides = [weight.clone() for weight in weights], rooms(), [rooms(), rooms()]
        visit(slot, moves, copies, Direction(5, 3, (1, 3)), size, sides)
        only_minus = rooms()
        visit([weight.clone() for weight in weights], (), None, Direction(5, 3, (1, 3)), size, ((), only_minus))
        signs = Direction(5, 2, (1, 3))
        return [*(signs.of(weight) for weight in weights), *slot, *copies, *sides[0], *sides[1], *only_minus]

    found = visited()
    for name in ("_draw", "_visit"):
        monkeypatch.setattr(directions, name, lambda: None)
    assert all(torch.equal(ours, torchs) for ours, torchs in zip(found, visited(), strict=True))
    assert all(set(sign.tolist()) <= {1, -1} for sign in found[:5])
    assert abs(found[4].float().mean()) < 0.02


def test_bit_equal_to_the_resident_model_at_every_number_of_slots(folder):
    resident = ResidentZo(folder, OPTIONS)
    losses = [resident.step(number) for number in range(OPTIONS.steps)]
    for slots in (1, 5):
        tune(folder, f"slots{slots}", cache_experts=slots)
        found = AutoModelForCausalLM.from_pretrained(folder / f"slots{slots}").state_dict()
        for name, expected in resident.model.state_dict().items():
            assert torch.equal(found[name], expected), (slots, name)
        log = read_log(folder / f"slots{slots}" / "metrics.jsonl")
        assert [row["loss"] for row in log] == losses


def test_each_expert_is_read_once_per_step(folder):
    tune(folder, "once", dataclasses.replace(OPTIONS, steps=2), cache_experts=1)
    row = read_log(folder / "once" / "metrics.jsonl")[0]
    touched = sum(share > 0 for layer in row["load"] for share in layer)
    item = AutoModelForCausalLM.from_pretrained(folder / "model").dtype.itemsize
    assert row["bytes_read"] == touched * 3 * 64 * 64 * item


def test_continues_bit_by_bit_after_its_last_commit(folder):
    tune(folder, "whole", cache_experts=2)

    def kill(row):
        if row["step"] == 3:
            raise SystemError

    with pytest.raises(SystemError):
        tune(folder, "killed", cache_experts=2, advance=kill)
    assert [path.name for path in (folder / "killed" / "checkpoints").iterdir()] == ["step_00000002"]
    tune(folder, "killed", cache_experts=5, resume=True)
    expected = weights_of(folder / "whole")
    assert all(torch.equal(value, expected[name]) for name, value in weights_of(folder / "killed").items())


def test_a_run_whose_directions_were_drawn_otherwise_is_refused():
    begun = SimpleNamespace(_peers=SimpleNamespace(number=0))
    with pytest.raises(ValueError, match="begin it anew"):
        ForwardOnly.restore(begun, {}, {"processes": [{"records": {}, "pending": {}, "sizes": {}}]})

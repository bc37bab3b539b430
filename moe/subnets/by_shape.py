"""Any-shape subnets: one dense model tuned once, from which plain models of every depth and width are cut out.

A shape is a depth and a width. Which layers and units it keeps is chosen beforehand (`calibration`). The frozen weights
of each matrix get a mixture of low-rank adapters whose gates depend on the shape alone:

    W(shape) = W + alpha / r * sum over the K gates of g_e(shape) B_e A_e

Gates are a softmax over the K largest of a router's scores (noisy in training) of the shape's one-hot depth and width;
each decoder layer has its own. A shape's weights are sliced to its layers and units, so what is trained is what is cut
out. Training takes the largest shape, the smallest and some others in each step; the largest learns from the text, the
others from the largest, each loss scaled to the magnitude of the largest shape's:

    loss = CE(largest) + sum over others of [CE(largest) / KL_i] KL(largest || shape_i), brackets without gradient

Source: Fu et al. 2024 (AmoebaLLM), arXiv:2411.10606, section 3; router and number of sampled shapes as in its code.
Ours: the balancing factor as it is written here, from the abstract's words; adapters on decoder layers' matrices.

Shapes: B sequences, S positions, F hidden units of the dense feed-forward, I inputs, O outputs, L layers, V vocabulary,
E adapters of a matrix, K adapters of a shape, r = rank of an adapter.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy, kl_div, log_softmax, one_hot, softplus

from ..model.decoder import MoEForCausalLM
from .subnet import LAYER, Subnet, evened, expect_dense, hollow, sliced_weights, strongest

Shape = tuple[int, int]
INNER_WIDTH = 16
"""Of the routers, as in the official code."""


@dataclass(frozen=True, kw_only=True)
class ShapePlan:
    """Adapters and their training.

    Args:
        adapters, adapters_used: E and K; one of one is LoRA.
        rank: r, of each adapter.
        alpha: adapters are scaled by alpha / r.
        balances: whether losses are scaled to the largest shape's magnitude.
        sampled: shapes of a step beside the largest and the smallest.

    Raises:
        ValueError: if a number is out of range.
    """

    adapters: int = 5
    adapters_used: int = 2
    rank: int = 4
    alpha: float = 16.0
    balances: bool = True
    sampled: int = 2

    def __post_init__(self) -> None:
        if not 1 <= self.adapters_used <= self.adapters:
            raise ValueError(f"adapters_used must lie in 1..{self.adapters} (adapters); got {self.adapters_used}")
        if self.rank < 1 or self.sampled < 0:
            raise ValueError(f"rank must be at least 1 and sampled at least 0; got {self.rank} and {self.sampled}")


class ElasticModel(nn.Module):
    """A frozen dense model, the subnet of each shape, and what is trained: adapters and gates.

    Args:
        model: a dense decoder of ours; its weights are frozen.
        importance_LF: of hidden units, as `unit_importance` gives it.
        dropped: layers that are left out for each depth, as `droppable_layers` gives it: none, one, two, ...
        widths: kept hidden units per layer to choose from, descending from F.
        plan: adapters and losses.
        seed: of adapters, gates, noise and sampled shapes.

    Raises:
        ValueError: if the model is not dense, or the widths do not begin with F and fall.
    """

    def __init__(
        self,
        model: MoEForCausalLM,
        importance_LF: Tensor,
        dropped: Sequence[frozenset[int]],
        widths: Sequence[int],
        plan: ShapePlan,
        seed: int = 0,
    ) -> None:
        super().__init__()
        expect_dense(model)
        F, L = model.config.moe_intermediate_size, model.config.num_hidden_layers
        if list(widths) != sorted(set(widths), reverse=True) or widths[0] != F:
            raise ValueError(f"widths must fall and begin with {F}, the model's own; got {list(widths)}")
        self._model, self.plan = (model.requires_grad_(False),), plan
        self.generator = torch.Generator().manual_seed(seed)
        self.depths, self.widths = [L - len(layers) for layers in dropped], list(widths)
        kept = {L - len(layers): [layer for layer in range(L) if layer not in layers] for layers in dropped}
        self.subnets: dict[Shape, Subnet] = {
            (depth, width): strongest(importance_LF, layers, width)
            for depth, layers in kept.items()
            for width in widths
        }
        self._hollow: dict[Shape, MoEForCausalLM] = {}
        self.adapters_a, self.adapters_b = nn.ParameterDict(), nn.ParameterDict()
        for name, weight in self._matrices().items():
            O, I = weight.shape[-2:]
            start = torch.rand(plan.adapters, plan.rank, I, generator=self.generator) * 2 - 1
            self.adapters_a[_key(name)] = nn.Parameter((start * I**-0.5).to(weight.dtype))
            self.adapters_b[_key(name)] = nn.Parameter(torch.zeros(plan.adapters, O, plan.rank, dtype=weight.dtype))
        choices = len(self.depths) + len(self.widths)
        self.gates = nn.ModuleList(
            ShapeGate(choices, plan, self.generator).to(model.dtype) for _ in range(L if plan.adapters > 1 else 0)
        )

    @property
    def largest(self) -> Shape:
        """The whole model's shape."""
        return self.depths[0], self.widths[0]

    @property
    def smallest(self) -> Shape:
        """The fewest layers and units."""
        return self.depths[-1], self.widths[-1]

    def weights(self, shape: Shape) -> dict[str, Tensor]:
        """A subnet's weights by their names in the plain model, adapters added; gradients reach adapters and gates.

        Raises:
            ValueError: if there is no such shape.
        """
        if shape not in self.subnets:
            raise ValueError(f"shapes are of depth {self.depths} and width {self.widths}; got {shape}")
        added = dict(self._model[0].state_dict())
        gate_LE = self._gates(shape)
        for name, weight in self._matrices().items():
            layer = int(LAYER.match(name)[1])  # type: ignore[index]
            a_ErI, b_EOr = self.adapters_a[_key(name)], self.adapters_b[_key(name)]
            delta_OI = torch.einsum("e,eor,eri->oi", gate_LE[layer], b_EOr, a_ErI)
            added[name] = weight + (delta_OI * (self.plan.alpha / self.plan.rank)).view_as(weight)
        return sliced_weights(added, self.subnets[shape])

    def forward(self, token_BS: Tensor, shape: Shape) -> Tensor:
        """Logits [B, S, V] of a shape's subnet."""
        if shape not in self._hollow:
            self._hollow[shape] = hollow(self._model[0], self.subnets[shape]).requires_grad_(False)
        return functional_call(self._hollow[shape], self.weights(shape), (token_BS,), {"use_cache": False}).logits

    def loss(self, token_BS: Tensor) -> Tensor:
        """The loss of one step: the largest shape on the text, the smallest and drawn ones on the largest's output."""
        logits = self(token_BS, self.largest)[:, :-1].flatten(0, 1).float()
        own = cross_entropy(logits, token_BS[:, 1:].flatten())
        teacher, total = log_softmax(logits.detach(), dim=-1), own
        for shape in self.step_shapes():
            log_p = log_softmax(self(token_BS, shape)[:, :-1].flatten(0, 1).float(), dim=-1)
            distilled = kl_div(log_p, teacher, reduction="batchmean", log_target=True)
            scale = own.detach() / distilled.detach().clamp_min(torch.finfo(distilled.dtype).eps)
            total = total + (distilled * scale if self.plan.balances else distilled)
        return total

    def step_shapes(self) -> list[Shape]:
        """The smallest shape, and as many drawn ones as the plan says, each once; without the largest."""
        others = [shape for shape in self.subnets if shape not in (self.largest, self.smallest)]
        order = torch.randperm(len(others), generator=self.generator)[: self.plan.sampled].tolist()
        smallest = [self.smallest] if self.smallest != self.largest else []
        return smallest + [others[place] for place in order]

    def extract(self, shape: Shape) -> MoEForCausalLM:
        """A shape's subnet as a plain model, which can be saved and run like any other; its gates are without noise."""
        was_training = self.training
        self.eval()
        with torch.no_grad():
            weights = {name: value.clone() for name, value in self.weights(shape).items()}
        self.train(was_training)
        cut = hollow(self._model[0], self.subnets[shape])
        cut.load_state_dict(weights)
        return evened(cut).eval()

    def _gates(self, shape: Shape) -> Tensor:
        """[L, E]: the weights of each layer's adapters."""
        if not self.gates:
            return next(iter(self.adapters_a.values())).new_ones(self._model[0].config.num_hidden_layers, 1)
        place = [self.depths.index(shape[0]), len(self.depths) + self.widths.index(shape[1])]
        code = one_hot(torch.tensor(place), len(self.depths) + len(self.widths)).sum(dim=0)
        return torch.stack([gate(code.to(gate.inner), self.generator) for gate in self.gates])

    def _matrices(self) -> Mapping[str, Tensor]:
        """Matrices of decoder layers by name; those of a bank of one expert are [1, O, I]."""
        return {
            name: parameter.detach()
            for name, parameter in self._model[0].named_parameters()
            if LAYER.match(name) and parameter.ndim > 1 and "router" not in name
        }


class ShapeGate(nn.Module):
    """Weights of a layer's adapters from a shape: a softmax over the K best scores, noisy in training.

    Args:
        choices: depths and widths to choose from.
        plan: E and K.
        generator: its draws start the weights.
    """

    def __init__(self, choices: int, plan: ShapePlan, generator: torch.Generator) -> None:
        super().__init__()

        def start(*size: int) -> nn.Parameter:
            return nn.Parameter((torch.rand(*size, generator=generator) * 2 - 1) / math.sqrt(size[-1]))

        self.inner, self.outer = start(INNER_WIDTH, choices), start(plan.adapters, INNER_WIDTH)
        self.noise = start(plan.adapters, choices)
        self.adapters_used = plan.adapters_used

    def forward(self, code: Tensor, generator: torch.Generator) -> Tensor:
        """[E], K of them above 0, in sum 1; `code` has a 1 for the depth and one for the width."""
        score_E = self.outer @ (self.inner @ code)
        if self.training:
            drawn_E = torch.randn(len(score_E), generator=generator).to(score_E)
            score_E = score_E + drawn_E * softplus(self.noise @ code)
        best = score_E.topk(self.adapters_used)
        return torch.zeros_like(score_E).scatter(0, best.indices, best.values.softmax(dim=0))


def _key(name: str) -> str:
    """A name that torch allows for a parameter of a dict."""
    return name.replace(".", "/")

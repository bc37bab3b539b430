"""Subnet: some layers and some hidden units of a dense decoder, and the plain model that they are by themselves.

Shapes: D model width, F hidden units of the dense feed-forward, L layers.
"""

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..layers.stack import Stack
from ..model.decoder import MoEForCausalLM
from ..model.decoder_layer import DecoderLayer

LAYER = re.compile(r"model\.layers\.(\d+)\.")
GATE_UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"


@dataclass(frozen=True, eq=False)
class Subnet:
    """What is kept of a dense decoder.

    Args:
        layers: numbers of the kept decoder layers, ascending.
        units: per kept layer, int64 numbers of its kept hidden units, ascending.

    Raises:
        ValueError: if nothing is kept, or both do not fit each other.
    """

    layers: tuple[int, ...]
    units: tuple[Tensor, ...]

    def __post_init__(self) -> None:
        if not self.layers or sorted(set(self.layers)) != list(self.layers):
            raise ValueError(f"kept layers must be at least one, each once, ascending; got {self.layers}")
        if len(self.units) != len(self.layers) or not all(len(unit) for unit in self.units):
            raise ValueError(f"expected kept units, at least one, of each of {len(self.layers)} layers")

    @property
    def widths(self) -> list[int]:
        """Kept hidden units per kept layer."""
        return [len(unit) for unit in self.units]


def expect_dense(model: MoEForCausalLM) -> None:
    """Raise unless subnets can be cut out of a model: plain decoder layers in a row, one expert each.

    Raises:
        ValueError: if the model is another.
    """
    config, layers = model.config, model.model.layers
    is_plain = config.architecture == "moe" and type(model.model.stack) is Stack and not config.num_dense_layers
    is_dense = config.num_experts == 1 and not config.num_shared_experts and not config.zero_compute_experts
    if not (is_plain and is_dense and all(type(layer) is DecoderLayer for layer in layers)):
        raise ValueError(
            "subnets are cut out of dense decoders: architecture moe, num_experts 1, without dense layers, shared and "
            f"zero-compute experts; got architecture {config.architecture}, num_experts {config.num_experts}"
        )


def whole(model: MoEForCausalLM) -> Subnet:
    """The subnet that is the model."""
    F = model.config.moe_intermediate_size
    numbers = range(model.config.num_hidden_layers)
    return Subnet(tuple(numbers), tuple(torch.arange(F) for _ in numbers))


def kept_share(model: MoEForCausalLM, subnet: Subnet) -> float:
    """Operations of a subnet's matrices in decoder layers, of those of the model."""
    layer = model.model.layers[0]
    attention = sum(p.numel() for p in layer.self_attn.parameters() if p.ndim > 1)
    _, D, F = layer.mlp.experts.down_proj.shape
    kept = sum(attention + 3 * D * width for width in subnet.widths)
    return kept / (model.config.num_hidden_layers * (attention + 3 * D * F))


def sliced_weights(weights: Mapping[str, Tensor], subnet: Subnet) -> dict[str, Tensor]:
    """A subnet's weights by their names in the plain model, from the dense one's; gradients pass.

    Args:
        weights: of the dense model, by name.
        subnet: what is kept.
    """
    place = {layer: number for number, layer in enumerate(subnet.layers)}
    sliced = {}
    for name, value in weights.items():
        found = LAYER.match(name)
        if found is None:
            sliced[name] = value
        elif (layer := int(found[1])) in place:
            rest = name[found.end() :]
            unit = subnet.units[place[layer]]
            if rest == GATE_UP:
                gate, up = value.chunk(2, dim=1)
                value = torch.cat([gate[:, unit], up[:, unit]], dim=1)
            elif rest == DOWN:
                value = value[:, :, unit]
            sliced[f"model.layers.{place[layer]}.{rest}"] = value
    return sliced


def hollow(model: MoEForCausalLM, subnet: Subnet) -> MoEForCausalLM:
    """A model of a subnet's sizes whose weights are yet to come; each layer is as wide as its kept units."""
    expect_dense(model)
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = len(subnet.layers)
    config.moe_intermediate_size = max(subnet.widths)
    cut = MoEForCausalLM(config).to(model.dtype).train(model.training)
    for layer, width in zip(cut.model.layers, subnet.widths, strict=True):
        experts = layer.mlp.experts
        experts.gate_up_proj = nn.Parameter(experts.gate_up_proj.detach()[:, : 2 * width].clone())
        experts.down_proj = nn.Parameter(experts.down_proj.detach()[:, :, :width].clone())
    return cut


def carve(model: MoEForCausalLM, subnet: Subnet, *, is_even: bool = False) -> MoEForCausalLM:
    """A subnet as a model of its own, with copies of its weights.

    Args:
        model: a dense one.
        subnet: what is kept.
        is_even: whether narrower layers are filled up with units of zeros, so that all layers are equally wide and the
            model can be saved. Without it they are as narrow as they are, which `save_pretrained` cannot express.

    Raises:
        ValueError: if the model is not dense.
    """
    cut, weights = hollow(model, subnet), sliced_weights(model.state_dict(), subnet)
    cut.load_state_dict(weights)
    return evened(cut) if is_even else cut


@torch.no_grad()
def evened(cut: MoEForCausalLM) -> MoEForCausalLM:
    """The same function with layers equally wide, by units of zeros; the model is changed in place."""
    widest = cut.config.moe_intermediate_size
    for layer in cut.model.layers:
        experts = layer.mlp.experts
        missing = widest - experts.down_proj.shape[2]
        gate, up = (nn.functional.pad(part, (0, 0, 0, missing)) for part in experts.gate_up_proj.chunk(2, dim=1))
        experts.gate_up_proj = nn.Parameter(torch.cat([gate, up], dim=1))
        experts.down_proj = nn.Parameter(nn.functional.pad(experts.down_proj, (0, missing)))
    return cut


def strongest(importance_LF: Tensor, layers: Sequence[int], width: int) -> Subnet:
    """Some layers with their most important hidden units, ties to the lower number.

    Args:
        importance_LF: of every unit of every layer of the dense model.
        layers: kept.
        width: kept units per layer, 1..F.
    """
    if not 1 <= width <= importance_LF.shape[1]:
        raise ValueError(f"width must lie in 1..{importance_LF.shape[1]}; got {width}")
    order_LF = importance_LF.argsort(dim=1, descending=True, stable=True)
    return Subnet(tuple(layers), tuple(order_LF[layer, :width].sort().values for layer in layers))

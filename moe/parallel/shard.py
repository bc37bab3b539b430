"""A model over the processes of a layout: experts by transformers' expert parallelism, the rest by FSDP2.

Routers stay whole on every process. Some read their own parameters after a step, and one shares a cell between layers,
which FSDP2 cannot split; all routers of a model together are small beside its experts.

Shapes: E experts.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers.distributed.expert_parallel import apply_expert_parallelism

from ..architectures.recursion.depth import TokenChoiceDepth
from ..architectures.sparsity_router import SparsityRouter
from ..experts.bank import Experts
from ..layers.layer import RoutedLayer
from .degrees import DEGREES, Degree, Row, degrees
from .layout import BY_TIME, Layout


@dataclass(frozen=True, kw_only=True, eq=False)
class Split:
    """A model that was split.

    Args:
        layout: its processes.
        mesh: all of them as one axis.
        whole: parameters that every process holds whole, the routers'; FSDP2 leaves their gradients alone.
        only: parameters that no other process has a part of: experts, where no two rows of the layout hold the same.
        experts: the expert banks that are split by expert.
        rows: where degrees may change, the groups of each expert degree.
    """

    layout: Layout
    mesh: DeviceMesh
    whole: list[nn.Parameter]
    only: list[nn.Parameter]
    experts: list[nn.Module]
    rows: dict[int, Row] = field(default_factory=dict)

    @property
    def degrees(self) -> tuple[Degree, ...]:
        """What a step can choose from; none where the layout is fixed."""
        return degrees(self.layout.processes) if self.rows else ()

    def take(self, degree: Degree) -> None:
        """Reach all experts under a degree from now on; every process takes the same one."""
        for bank in self.experts:
            bank.dispatch.take(degree, self.rows[degree.expert])


def expect_splittable(model: nn.Module, layout: Layout) -> None:
    """Refuse what cannot be split; nothing is changed, and no process group is needed.

    Args:
        model: a `MoEForCausalLM`.
        layout: how many processes there will be along each axis.

    Raises:
        ValueError: if the architecture or the router cannot be trained on several processes, or E does not divide.
    """
    name = f"the architecture {model.config.architecture!r}"
    for module in model.modules():
        if isinstance(module, TokenChoiceDepth):
            raise ValueError(
                f"{name} cannot be trained on several processes: how often the layers run depends on the tokens of "
                "each process, and the others would wait; take choice='expert'"
            )
        if isinstance(module, SparsityRouter):
            raise ValueError(
                f"{name} cannot be trained on several processes: the router reads the weights of all experts, of "
                "which each process has a part; train it in one process"
            )
    if layout.expert == 1:
        return
    asked = BY_TIME if layout.by_time else f"expert={layout.expert}"
    banks = [bank for _, bank in expert_banks(model)]
    if not banks:
        raise ValueError(f"{name} has no bank of plain experts to split; leave {asked} out of --parallel")
    for bank in banks:
        if bank.num_experts % layout.expert:
            raise ValueError(
                f"{asked} must divide the {bank.num_experts} experts of a layer"
                + (f" by {layout.expert} processes" if layout.by_time else "")
            )


def expert_banks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every bank of plain experts of the routed layers, once, with its name."""
    found: set[nn.Module] = set()
    for name, module in model.named_modules():
        bank = getattr(module, "experts", None)
        if isinstance(module, RoutedLayer) and type(bank) is Experts and bank not in found:
            found.add(bank)
            yield f"{name}.experts", bank


def split(
    model: nn.Module,
    layout: Layout,
    device_type: str = "cpu",
    dispatch: str = "expertier",
    *,
    stays_gathered: bool = False,
) -> Split:
    """Split a model in place; every process has built the same one, and all call this together.

    Args:
        model: a `MoEForCausalLM`, whole.
        layout: the processes; they are all those of the process group.
        device_type: `cpu` or `cuda`.
        dispatch: a name of `DISPATCHES`, or one of transformers' own; of no effect where degrees may change.
        stays_gathered: keep a layer's gathered weights from its forward pass to its backward pass, which saves a third
            of the bytes and takes the memory of a whole model. The same on every process.

    Raises:
        ValueError: if the model cannot be split.
    """
    expect_splittable(model, layout)
    W, expert = layout.processes, layout.expert
    mesh = init_device_mesh(device_type, (W,), mesh_dim_names=("fsdp",))
    whole = list(dict.fromkeys(p for router in model.model.routers for p in router.parameters()))
    banks = dict(expert_banks(model)) if expert > 1 else {}
    only: list[nn.Parameter] = []
    if banks:
        grid = init_device_mesh(device_type, (layout.data, expert, 1), mesh_dim_names=("efsdp", "ep", "tp"))
        dispatch = DEGREES if layout.by_time else dispatch
        apply_expert_parallelism(model, grid["ep"], grid["tp"], _rules(banks), ep_implementation=dispatch)
        if layout.data == 1:  # FSDP2 would copy every bank once more, for nobody
            only = [parameter for bank in banks.values() for parameter in bank.parameters()]
        else:
            for bank in banks.values():
                _split_copies(bank, grid["efsdp"], W)
    ignored = {*whole, *only}
    layers = list(model.model.layers)
    for layer in layers:
        # a table that later layers read as well stays gathered until the first of them is done with its gradient
        stays = stays_gathered or any(getattr(module, "readers", 1) > 1 for module in layer.modules())
        fully_shard(layer, mesh=mesh, reshard_after_forward=not stays, ignored_params=ignored)
    fully_shard(model, mesh=mesh, ignored_params=ignored)
    # on a CPU there are no streams: FSDP2 would wait for each layer's weights without computing anything meanwhile
    for module, following in pairwise([model, *layers]):
        module.set_modules_to_forward_prefetch([following])
    choices = degrees(W) if banks and layout.by_time else ()
    pieces = Split(
        layout=layout,
        mesh=mesh,
        whole=whole,
        only=only,
        experts=list(banks.values()),
        rows={degree.expert: Row.of(degree.expert, W) for degree in choices if degree.parts == 1},
    )
    if choices:
        pieces.take(choices[0])
    return pieces


def _rules(banks: dict[str, nn.Module]) -> dict[str, str]:
    """transformers' names of how each parameter and module is split; parameters first, as it wants them."""
    rules: dict[str, str] = {}
    for name, bank in banks.items():
        rules |= {f"{name}.{parameter}": "grouped_gemm" for parameter, _ in bank.named_parameters(recurse=False)}
        rules[name] = "ep_dispatch_experts"
    return rules


def _split_copies(bank: nn.Module, mesh: DeviceMesh, processes: int) -> None:
    """Split a bank over the processes that hold the same experts; its gradient is the mean over all processes.

    A process computes its experts for the tokens of its whole row, so the sum over the rows is that over all tokens.
    """
    fully_shard(bank, mesh=mesh, reshard_after_forward=True)
    bank.set_gradient_divide_factor(float(processes))
    # otherwise FSDP2 asks for a sum with a factor of one's own, which gloo lacks
    bank.set_force_sum_reduction_for_comms(True)

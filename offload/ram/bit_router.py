"""The bit router: a small gate for each layer that says from how many levels each expert of each token is computed.

Its file is safetensors beside the packed copy, `PACK.router`: of each layer `N.weight` `[V, D]` and `N.bias` `[E, V]`,
float32. `expertier pack --router-bits` trains it.

Source: D2MoE (arXiv:2504.15299), section 3.2.

Shapes: T tokens, K experts per token, E experts, D model width, V levels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..formats.lossy.levelled import LevelledForm

MOST_BYTES = 1 << 30
"""Of a file: 60 layers of 256 experts, 7,168 wide and with four levels, take 7 MB."""


@dataclass(frozen=True, eq=False)
class BitGate:
    """The gate of one layer, a rule for depths.

    Args:
        weight_VD: of a token's hidden state.
        bias_EV: of each expert.
    """

    weight_VD: torch.Tensor
    bias_EV: torch.Tensor

    is_exact = True
    num_deep = None

    def logits(self, x_ND: torch.Tensor, expert_N: torch.Tensor) -> torch.Tensor:
        """How well each number of levels suits, `[N, V]`."""
        return x_ND.float() @ self.weight_VD.T + self.bias_EV[expert_N]

    def depths(
        self, x_TD: torch.Tensor, expert_TK: torch.Tensor, weight_TK: torch.Tensor, is_there_E: torch.Tensor
    ) -> torch.Tensor:
        """Levels that each expert of each token is computed from, whatever is there."""
        known_TK = expert_TK.clamp(0, len(self.bias_EV) - 1)
        hidden_TV = x_TD.float() @ self.weight_VD.T
        return 1 + (hidden_TV[:, None] + self.bias_EV[known_TK]).argmax(-1)


def router_file(pack: Path) -> Path:
    """Where the router of a packed copy is."""
    return pack.with_name(f"{pack.name}.router")


def save_router(pack: Path, gates: Mapping[int, BitGate], about: Mapping[str, str]) -> None:
    """Write the gates of layers, atomically.

    Args:
        pack: the packed copy.
        gates: by layer.
        about: what people want to know of them.
    """
    tensors = {}
    for layer, gate in gates.items():
        tensors[f"{layer}.weight"], tensors[f"{layer}.bias"] = gate.weight_VD.contiguous(), gate.bias_EV.contiguous()
    target = router_file(pack)
    part = target.with_name(f"{target.name}.part")
    save_file(tensors, part, metadata=dict(about))
    part.replace(target)


def load_router(pack: Path, forms: Sequence[object], width_L: Sequence[int]) -> dict[int, BitGate]:
    """The gates of all layers that are in levels.

    Args:
        pack: the packed copy.
        forms: of its layers.
        width_L: D of each layer.

    Raises:
        ValueError: if there is no router, or it is of other layers.
    """
    file = router_file(pack)
    if not file.is_file():
        raise ValueError(f"{file}: no such file; `expertier pack --form planes --router-bits` trains a router")
    if file.stat().st_size > MOST_BYTES:
        raise ValueError(f"{file}: {file.stat().st_size} bytes are too many for a router")
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: not a file of safetensors ({error}); train the router again") from error
    gates = {}
    for layer, (form, width) in enumerate(zip(forms, width_L, strict=True)):
        if not isinstance(form, LevelledForm):
            continue
        shapes = {f"{layer}.weight": (len(form.level_ends), width)}
        shapes[f"{layer}.bias"] = (form.layer.num_experts, len(form.level_ends))
        for name, shape in shapes.items():
            found = tensors.get(name)
            is_usable = found is not None and found.dtype == torch.float32 and bool(found.isfinite().all())
            if found is None or not is_usable or tuple(found.shape) != shape:
                got = "nothing" if found is None else f"{found.dtype} {list(found.shape)}"
                raise ValueError(f"{file}: {name} should be finite float32 {list(shape)}; got {got}; train it again")
        gates[layer] = BitGate(tensors[f"{layer}.weight"], tensors[f"{layer}.bias"])
    return gates

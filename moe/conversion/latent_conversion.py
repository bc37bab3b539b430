"""Turn a trained mixture of experts into one with latent experts, layer by layer.

Shapes: E experts, D model width, F expert width, T tokens.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from routing.ground.files import write_json

from ..model.decoder import MoEForCausalLM
from ..parts.text import carry_text_files, token_rows
from .factorise import Factors, Whitening, factorise
from .layer_by_layer import mean_loss, streamed_experts
from .source import INDEX_NAME, OurSource, meta_model
from .staging import staged_folder

# tokens of one sequence that activations are taken from; not tuned
ROW_LENGTH = 512


@dataclass(frozen=True, kw_only=True)
class LatentPlan:
    """What to convert into.

    Args:
        group: experts that share a basis.
        rank: latent width.
        expert_rank: rank that each expert's matrices are reduced to before; None leaves them.
        whiten: a text whose activations weigh the error, or None.
        data: a text to score before and after, or None.
        tokens: of each text, at most.
    """

    group: int
    rank: int
    expert_rank: int | None = None
    whiten: Path | None = None
    data: Path | None = None
    tokens: int = 4096


def convert_to_latent(
    folder: Path, out: Path, plan: LatentPlan, advance: Callable[[int, int], None] = lambda done, total: None
) -> dict[str, Any]:
    """Write a checkpoint with latent experts; in memory are what is not experts, and the experts of one layer.

    Args:
        folder: a checkpoint of ours with plain experts, or an `olmoe`, `qwen3_moe` or `mixtral` one.
        out: folder to write; appears whole or not at all.
        plan: group, ranks, texts.
        advance: is told how many layers are done, of how many.

    Returns:
        Errors per layer and in all (squared, in float64 before rounding to the checkpoint's dtype, beside the tails of
        singular values that they must equal), sizes, and losses if `plan.data` is given.

    Raises:
        ValueError: if the model cannot be expressed, or the plan does not fit it.
    """
    conversion = _Conversion(folder, plan)
    with staged_folder(out) as unfinished:
        return conversion.run(unfinished, advance)


class _Conversion:
    def __init__(self, folder: Path, plan: LatentPlan) -> None:
        self.folder, self.plan = folder, plan
        self.source = OurSource(folder)
        config = self.source.config
        self.config = copy.deepcopy(config)
        self.config.architecture = "latent"
        self.config.architecture_options = {"group": plan.group, "rank": plan.rank}
        # before anything is read: sizes that do not fit are refused here
        self.after = meta_model(MoEForCausalLM, self.config).eval()
        self.before = meta_model(MoEForCausalLM, config).eval()
        narrow = min(config.hidden_size, config.moe_intermediate_size)
        if plan.expert_rank is not None and not 1 <= plan.expert_rank <= narrow:
            raise ValueError(
                f"expert-rank must lie in 1..{narrow} (expert width and model width); got {plan.expert_rank}"
            )
        self.num_layers = config.num_moe_layers

    def run(self, out: Path, advance: Callable[[int, int], None]) -> dict[str, Any]:
        plan = self.plan
        resident = self.source.resident()
        for model in (self.before, self.after):
            model.load_state_dict(resident, strict=False, assign=True)
            model.tie_weights()
        texts = {name: self._rows(file) for name, file in (("whiten", plan.whiten), ("data", plan.data)) if file}
        weight_map: dict[str, str] = {}
        _save(resident, out, "model-resident.safetensors", weight_map)
        layers: list[dict[str, Any]] = []

        def finish(layer: int, weights: Mapping[str, Tensor], moment_DD: Tensor | None = None) -> None:
            factored, facts = self._factored(weights, None if moment_DD is None else Whitening.of(moment_DD))
            prefix = self.source.experts_prefix(layer)
            named = {prefix + name: value for name, value in factored.items()}
            _save(named, out, f"model-layer-{layer:05d}.safetensors", weight_map)
            layers.append({"layer": layer, **facts})
            advance(layer + 1, self.num_layers)

        if "whiten" in texts:
            self._convert_whitened(texts["whiten"], finish)
        else:
            for layer in range(self.num_layers):
                finish(layer, self.source.experts(layer))
        write_json(out / INDEX_NAME, {"metadata": {"total_size": _bytes(out)}, "weight_map": weight_map})
        self.config.architectures = ["MoEForCausalLM"]
        self.config.save_pretrained(out)
        carry_text_files(self.folder, out, vocab_size=self.config.vocab_size if self.source.is_ours else None)
        return self._report(out, layers, texts.get("data"))

    def _rows(self, file: Path) -> Tensor:
        length = min(ROW_LENGTH, self.config.max_position_embeddings)
        return token_rows(self.folder, self.config.vocab_size, [file], length, self.plan.tokens)

    @torch.no_grad()
    def _convert_whitened(self, token_BS: Tensor, finish: Callable[..., None]) -> None:
        """One pass of the plain model over the text; each layer is converted with the inputs that its experts see."""
        held: dict[str, Any] = {}

        def see(layer: int, x_TD: Tensor) -> None:
            held["moment"] = sum(part.double().T @ part.double() for part in x_TD.split(1024))

        def read(layer: int) -> dict[str, Tensor]:
            weights = self.source.experts(layer)
            finish(layer, weights, held.pop("moment"))
            return weights

        with streamed_experts(self.before, read, see):
            self.before.model(token_BS, use_cache=False)

    def _factored(
        self, weights: Mapping[str, Tensor], whitening: Whitening | None
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Latent experts of one layer, and the errors of its gate and up projections."""
        gate_EFD, up_EFD = weights["gate_up_proj"].chunk(2, dim=1)
        dtype = gate_EFD.dtype
        parts: dict[str, list[Factors]] = {"gate": [], "up": []}
        for name, matrix_EFD in (("gate", gate_EFD), ("up", up_EFD)):
            for group in matrix_EFD.split(self.plan.group):
                found = factorise(group, self.plan.rank, matrix_rank=self.plan.expert_rank, whitening=whitening)
                # in the checkpoint's dtype at once: in float64 a whole layer would be four times as large
                rounded = {"left": found.left.to(dtype), "basis": found.basis.to(dtype)}
                parts[name].append(replace(found, **rounded))
        left = [torch.cat([factors.left for factors in parts[name]]) for name in ("gate", "up")]
        basis = {f"{name}_basis": torch.stack([factors.basis for factors in every]) for name, every in parts.items()}
        factored = {"gate_up_proj": torch.cat(left, dim=1), "down_proj": weights["down_proj"], **basis}
        return factored, {name: _errors(every) for name, every in parts.items()}

    def _report(self, out: Path, layers: list[dict[str, Any]], data_BS: Tensor | None) -> dict[str, Any]:
        every = [layer[name] for layer in layers for name in ("gate", "up")]
        total = {name: sum(part[name] for part in every) for name in every[0] if name != "relative_error"}
        whole = total["error_squared"] + total["truncation_error_squared"]
        report: dict[str, Any] = {
            "group": self.plan.group,
            "rank": self.plan.rank,
            "expert_rank": self.plan.expert_rank,
            "is_whitened": self.plan.whiten is not None,
            **total,
            "relative_error": (whole / max(total["norm_squared"], 1e-300)) ** 0.5,
            "parameters_before": sum(p.numel() for p in self.before.parameters()),
            "parameters_after": sum(p.numel() for p in self.after.parameters()),
            "bytes_after": _bytes(out),
            "layers": layers,
        }
        if data_BS is not None:
            with streamed_experts(self.before, self.source.experts):
                report["loss_before"] = mean_loss(self.before, data_BS)
            with streamed_experts(self.after, lambda layer: self._written(out, layer)):
                report["loss_after"] = mean_loss(self.after, data_BS)
            report["tokens"] = data_BS.numel()
        return report

    def _written(self, out: Path, layer: int) -> dict[str, Tensor]:
        prefix = self.source.experts_prefix(layer)
        found = load_file(out / f"model-layer-{layer:05d}.safetensors")
        return {name.removeprefix(prefix): value for name, value in found.items()}


def _errors(found: list[Factors]) -> dict[str, float]:
    names = {
        "error_squared": "error",
        "tail_squared": "tail",
        "truncation_error_squared": "truncation_error",
        "truncation_tail_squared": "truncation_tail",
        "norm_squared": "norm",
    }
    total = {name: sum(getattr(factors, field) for factors in found) for name, field in names.items()}
    whole = total["error_squared"] + total["truncation_error_squared"]
    return {**total, "relative_error": (whole / max(total["norm_squared"], 1e-300)) ** 0.5}


def _save(tensors: Mapping[str, Tensor], folder: Path, name: str, weight_map: dict[str, str]) -> None:
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / name, metadata={"format": "pt"})
    weight_map.update(dict.fromkeys(tensors, name))


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))

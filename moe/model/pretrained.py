"""MoEPreTrainedModel: initialisation, and what transformers must know of our models."""

import re

import torch
from torch import nn
from transformers import PreTrainedModel, initialization

from routing import ExactBuffers

from ..parts.config import MoEConfig


class MoEPreTrainedModel(PreTrainedModel):
    """Initialisation and what transformers needs to know about the architecture."""

    config_class = MoEConfig
    base_model_prefix = "model"
    _supports_sdpa = True
    _supports_attention_backend = False
    _no_split_modules = ("DecoderLayer",)

    def post_init(self) -> None:
        """As in transformers, which is told as well which buffers of our modules stay float32 when it loads them."""
        super().post_init()
        exact = (
            f"{prefix}.{name}".removeprefix(".")
            for prefix, module in self.named_modules()
            if isinstance(module, ExactBuffers)
            for name in module.exact_buffers
        )
        # transformers searches checkpoint keys for these as regular expressions
        self._keep_in_fp32_modules_strict |= {f"{re.escape(name)}$" for name in exact}

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        return super().get_correct_experts_implementation(requested_experts or "expertier")

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Linear | nn.Embedding):
            return
        if hasattr(module, "init_parameters"):
            module.init_parameters(self.config.initializer_range)
            return
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim > 1:
                initialization.normal_(parameter, mean=0.0, std=self.config.initializer_range)
            else:
                initialization.ones_(parameter) if name == "weight" else initialization.zeros_(parameter)

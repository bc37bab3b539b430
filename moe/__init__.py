"""What experts compute: experts, the layer, the decoder language model and its Hugging Face face.

Importing this package makes `AutoModelForCausalLM` know the model type `expertier`, and registers the experts
implementation of that name with transformers.
"""

from .architectures import ARCHITECTURES, build_body
from .config import MoEConfig
from .decoder import MoEForCausalLM, MoEModel, MoEOutput
from .experts import Experts
from .flops import LayerFlops, projection_flops
from .fused_experts import FusedCache, fused_experts
from .grouped import expertier_experts, grouped_experts
from .layer import MoELayer, RoutedLayer
from .reference import swiglu_experts_reference
from .stack import LayerPasses

__all__ = [
    "ARCHITECTURES",
    "Experts",
    "FusedCache",
    "LayerFlops",
    "LayerPasses",
    "MoEConfig",
    "MoEForCausalLM",
    "MoELayer",
    "MoEModel",
    "MoEOutput",
    "RoutedLayer",
    "build_body",
    "expertier_experts",
    "fused_experts",
    "grouped_experts",
    "projection_flops",
    "swiglu_experts_reference",
]

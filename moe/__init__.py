"""What experts compute: experts, the layer, the decoder language model and its Hugging Face face.

Importing this package makes `AutoModelForCausalLM` know the model type `expertier`, and registers the experts
implementation of that name with transformers.
"""

from .architectures import ARCHITECTURES, build_body
from .config import MoEConfig
from .decoder import MoEForCausalLM, MoEModel, MoEOutput
from .ensemble import EnsembleConfig, EnsembleForCausalLM, ensemble
from .experts import Experts
from .flops import LayerFlops, projection_flops
from .fused_experts import FusedCache, fused_experts
from .grouped import expertier_experts, grouped_experts
from .layer import FeedForward, MoELayer, RoutedLayer
from .product import Linear
from .reference import swiglu_experts_reference
from .skip_feed_forward import SkipReport, skip_feed_forward
from .stack import LayerPasses
from .surgery import drawn, join, most_used, prune
from .text import ByteText, TokenizerText, text_of

__all__ = [
    "ARCHITECTURES",
    "ByteText",
    "EnsembleConfig",
    "EnsembleForCausalLM",
    "Experts",
    "FeedForward",
    "FusedCache",
    "LayerFlops",
    "LayerPasses",
    "Linear",
    "MoEConfig",
    "MoEForCausalLM",
    "MoELayer",
    "MoEModel",
    "MoEOutput",
    "RoutedLayer",
    "SkipReport",
    "TokenizerText",
    "build_body",
    "drawn",
    "ensemble",
    "expertier_experts",
    "fused_experts",
    "grouped_experts",
    "join",
    "most_used",
    "projection_flops",
    "prune",
    "skip_feed_forward",
    "swiglu_experts_reference",
    "text_of",
]

"""What experts compute: experts, the layer, the decoder language model and its Hugging Face face.

Importing this package makes `AutoModelForCausalLM` know the model type `expertier`, and registers the experts
implementation of that name with transformers.
"""

from .adapters.shards import ShardAdapters, ShardPlan, attach_shards
from .architectures import ARCHITECTURES, Architecture, build_body
from .architectures.read_me.token_router import TokenTransformer, context_of
from .conversion.adoption.adopt import adopt, adopted_config
from .conversion.export import export
from .conversion.opening import load_model
from .conversion.prune_and_join import drawn, join, most_used, prune
from .experts.bank import Experts
from .experts.grouped import expertier_experts, grouped_experts
from .experts.reference import swiglu_experts_reference
from .inference.decentralised import DecentralisedDenoiser, PartitionRouter, nearest_parts
from .inference.early_exit import ExitReport, early_exit
from .inference.ensemble import EnsembleConfig, EnsembleForCausalLM, ensemble
from .inference.fused_condition import FusedCache, fused_experts
from .inference.mixture_of_thoughts import MixtureOfThoughts
from .inference.rewiring import Rewiring, generate_rewired, rewired
from .inference.skip_feed_forward import SkipReport, skip_feed_forward
from .layers.layer import FeedForward, MoELayer, RoutedLayer
from .layers.stack import LayerPasses
from .model.decoder import MoEForCausalLM, MoEModel, MoEOutput
from .model.denoiser import Denoiser, noise_levels, noised, sample
from .model.forecaster import Forecaster
from .parts.config import MoEConfig
from .parts.flops import LayerFlops, projection_flops
from .parts.linear import Linear
from .parts.text import ByteText, TokenizerText, save_byte_tokenizer, text_of
from .parts.tokenizer_files import open_tokenizer
from .subnets.by_prompt import PromptPlan, PromptPruner
from .subnets.by_shape import ElasticModel, ShapePlan
from .subnets.calibration import droppable_layers, unit_importance
from .subnets.subnet import Subnet, carve, kept_share, strongest

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "ByteText",
    "DecentralisedDenoiser",
    "Denoiser",
    "ElasticModel",
    "EnsembleConfig",
    "EnsembleForCausalLM",
    "ExitReport",
    "Experts",
    "FeedForward",
    "Forecaster",
    "FusedCache",
    "LayerFlops",
    "LayerPasses",
    "Linear",
    "MixtureOfThoughts",
    "MoEConfig",
    "MoEForCausalLM",
    "MoELayer",
    "MoEModel",
    "MoEOutput",
    "PartitionRouter",
    "PromptPlan",
    "PromptPruner",
    "Rewiring",
    "RoutedLayer",
    "ShapePlan",
    "ShardAdapters",
    "ShardPlan",
    "SkipReport",
    "Subnet",
    "TokenTransformer",
    "TokenizerText",
    "adopt",
    "adopted_config",
    "attach_shards",
    "build_body",
    "carve",
    "context_of",
    "drawn",
    "droppable_layers",
    "early_exit",
    "ensemble",
    "expertier_experts",
    "export",
    "fused_experts",
    "generate_rewired",
    "grouped_experts",
    "join",
    "kept_share",
    "load_model",
    "most_used",
    "nearest_parts",
    "noise_levels",
    "noised",
    "open_tokenizer",
    "projection_flops",
    "prune",
    "rewired",
    "sample",
    "save_byte_tokenizer",
    "skip_feed_forward",
    "strongest",
    "swiglu_experts_reference",
    "text_of",
    "unit_importance",
]

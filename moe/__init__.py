"""What experts compute: experts, the layer, the decoder language model and its Hugging Face face.

Importing this package makes `AutoModelForCausalLM` know the model type `expertier`, and registers the experts
implementation of that name with transformers.
"""

from .architectures import ARCHITECTURES
from .config import MoEConfig
from .decoder import MoEForCausalLM, MoEModel, MoEOutput
from .experts import Experts
from .grouped import expertier_experts, grouped_experts
from .layer import MoELayer
from .reference import swiglu_experts_reference

__all__ = [
    "ARCHITECTURES",
    "Experts",
    "MoEConfig",
    "MoEForCausalLM",
    "MoELayer",
    "MoEModel",
    "MoEOutput",
    "expertier_experts",
    "grouped_experts",
    "swiglu_experts_reference",
]

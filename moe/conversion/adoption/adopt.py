"""adopt: a checkpoint of any family that our decoder can express, as a model of ours that computes the same."""

from pathlib import Path

import torch

from ...model.decoder import MoEForCausalLM
from ...parts.config import MoEConfig
from ..families import DENSE_FAMILIES, config_of_moe
from ..opening import load_model, read_config
from ..same_function import expect_same_function
from .one_expert import one_expert_config, one_expert_state


def adopted_config(folder: Path) -> MoEConfig:
    """The config that `adopt` gives the model of a folder; weights are not read.

    Args:
        folder: a checkpoint folder: ours, `olmoe`, `qwen3_moe`, `mixtral`, or a dense `llama`,
            `mistral`, `qwen2` or `qwen3`.

    Raises:
        ValueError: if there is no checkpoint, or our decoder cannot express it; the message lists every reason.
    """
    config = read_config(folder)
    if isinstance(config, MoEConfig):
        return config
    return one_expert_config(config) if config.model_type in DENSE_FAMILIES else config_of_moe(config)


def adopt(folder: Path) -> MoEForCausalLM:
    """The model of a folder as one of ours, in float32, which is what a first step of training needs.

    Logits on a few tokens are compared with those of transformers' own class before it is returned.

    Args:
        folder: as for `adopted_config`.

    Raises:
        ValueError: as there, if weights are missing, or if the logits differ.
    """
    config = adopted_config(folder)
    source = load_model(folder, dtype=torch.float32)
    if isinstance(source, MoEForCausalLM):
        return source
    with torch.device("meta"):
        model = MoEForCausalLM(config)
    state = {name.replace(".mlp.gate.", ".mlp.router."): tensor for name, tensor in source.state_dict().items()}
    if source.config.model_type in DENSE_FAMILIES:
        state = one_expert_state(state, config)
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise ValueError(f"{folder}: its weights are not those of its config ({error})") from error
    model.tie_weights()
    model.generation_config = source.generation_config
    expect_same_function(source, model.eval(), "our model")
    return model

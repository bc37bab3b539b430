"""Checkpoints of a split run: written by all processes, readable by any number of them, one included.

The folder is that of a run in one process: the model is a Hugging Face folder. Only the optimiser's state differs: it
stands in a folder of torch.distributed.checkpoint, by names of parameters.
"""

import os
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
    load,
    save,
)
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.optim import AdamW
from transformers.distributed import consolidate_distributed_checkpoint

from moe import MoEForCausalLM

from ..run_folder import OPTIMIZER_FOLDER, STATE_FILES

MODEL_FILE = "model.safetensors"
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
"""Names instead of groups: how parameters are grouped depends on how they are split."""


def save_parts(folder: Path, step: int, model: MoEForCausalLM, optimizer: AdamW) -> None:
    """Write a checkpoint into a folder that is there; all processes call this together.

    Args:
        folder: the same on all processes.
        step: optimiser steps done.
        model, optimizer: split over the processes.
    """
    shards = folder / "shards"
    save(_even(_untied(model)), storage_writer=HuggingFaceStorageWriter(str(shards), save_distributed=True))
    save(_even(get_optimizer_state_dict(model, optimizer, options=FLAT)), checkpoint_id=folder / OPTIMIZER_FOLDER)
    if distributed.get_rank() == 0:
        consolidate_distributed_checkpoint(shards, folder)
        (written,) = folder.glob("*.safetensors")
        os.replace(written, folder / MODEL_FILE)
        (folder / "model.safetensors.index.json").unlink(missing_ok=True)
        shutil.rmtree(shards)
        # what transformers notes when it saves a model by itself
        model.config.architectures = [MoEForCausalLM.__name__]
        model.config.dtype = next(model.parameters()).dtype
        model.config.save_pretrained(folder)
        model.generation_config.save_pretrained(folder)
        torch.save({"step": step, "optimizer": None, "random": None}, folder / STATE_FILES["torch"])
    distributed.barrier()


def load_parts(folder: Path, model: MoEForCausalLM, optimizer: AdamW) -> int:
    """Read a checkpoint of any number of processes into a split model; all call this together. Returns its step.

    Raises:
        ValueError: if the state does not fit the model.
    """
    state: dict[str, Any] = torch.load(folder / STATE_FILES["torch"], weights_only=True, mmap=True)
    try:
        found = _even(_untied(model))
        load(found, storage_reader=HuggingFaceStorageReader(str(folder)))
        ours = get_model_state_dict(model)
        set_model_state_dict(model, _like(found, ours), options=StateDictOptions(strict=False))
        if state["optimizer"] is None:
            load_optimizer(folder, model, optimizer)
        else:
            _take_whole(state["optimizer"], model, optimizer)
    except (RuntimeError, KeyError, ValueError) as error:
        raise ValueError(f"{folder} does not fit this model: {error}") from error
    model.model.optimizer_step = state["step"]
    return state["step"]


def load_optimizer(folder: Path, model: nn.Module, optimizer: AdamW) -> None:
    """Read the optimiser's state of a split run, into any number of processes.

    The model must have no gradients: with them torch leaves the optimiser's state empty, and says nothing.
    """
    optimizer.zero_grad()
    ours = get_optimizer_state_dict(model, optimizer, options=FLAT)
    found = _even(ours)
    with warnings.catch_warnings():
        # one process is meant
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        load(found, checkpoint_id=folder / OPTIMIZER_FOLDER, no_dist=not distributed.is_initialized())
    set_optimizer_state_dict(model, optimizer, _like(found, ours), options=FLAT)


def _untied(model: nn.Module) -> dict[str, Any]:
    """The model's state without names that are tied to others, which files of Hugging Face leave out."""
    state = get_model_state_dict(model)
    tied = model._tied_weights_keys if model.config.tie_word_embeddings else {}
    return {name: value for name, value in state.items() if name not in tied}


def _even(state: Mapping[str, Any]) -> dict[str, Any]:
    """The state with every tensor split into contiguous parts: a checkpoint cannot describe interleaved ones."""
    return {name: _evenly(value) if isinstance(value, DTensor) else value for name, value in state.items()}


def _evenly(tensor: DTensor) -> DTensor:
    placements = [Shard(place.dim) if hasattr(place, "dim") else place for place in tensor.placements]
    return tensor.redistribute(placements=placements)


def _like(found: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, Any]:
    """What was read, split as ours is."""
    return {
        name: value.redistribute(placements=ours[name].placements) if isinstance(value, DTensor) else value
        for name, value in found.items()
    }


def _take_whole(state: dict[str, Any], model: nn.Module, optimizer: AdamW) -> None:
    """The optimiser's state of a run in one process, whose parameters are numbered: matrices first, then vectors."""
    parameters = list(model.parameters())
    numbered = [p for p in parameters if p.ndim >= 2] + [p for p in parameters if p.ndim < 2]
    if len(numbered) != sum(len(group["params"]) for group in state["param_groups"]):
        raise ValueError(f"the optimiser's state is of another number of parameters than {len(numbered)}")
    for number, entries in state["state"].items():
        parameter = numbered[number]
        optimizer.state[parameter] = {name: _part(value, parameter) for name, value in entries.items()}


def _part(value: Tensor, parameter: Tensor) -> Tensor:
    """This process's part of a whole tensor, split as the parameter is."""
    if value.shape != parameter.shape or not isinstance(parameter, DTensor):
        return value.clone()
    even = [Shard(place.dim) if hasattr(place, "dim") else place for place in parameter.placements]
    whole = distribute_tensor(value, parameter.device_mesh, even, src_data_rank=None)
    return whole.redistribute(placements=parameter.placements)

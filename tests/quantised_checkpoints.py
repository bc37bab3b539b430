"""Small checkpoints in quantised forms, and the plain checkpoints that they are the quantisations of.

Codes and scales are random bytes of a sensible range, so that the plain checkpoint is what the format's owner makes of
them: transformers' converters, compressed-tensors, or torch itself.
"""

import json
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM


def small_model(config):
    """A random bfloat16 model."""
    torch.manual_seed(0)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return AutoModelForCausalLM.from_config(config).bfloat16().eval()


def write_plain(config, folder: Path) -> dict[str, torch.Tensor]:
    """Save a random model; gives its tensors as the checkpoint names them."""
    small_model(config).save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def write_olmoe(folder: Path, **sizes: int) -> Path:
    """Save a random OLMoE of two layers, each of 4 experts of which 2 are chosen, unless sizes say otherwise."""
    usual = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    usual |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2}
    write_plain(transformers.OlmoeConfig(**(usual | sizes), eos_token_id=None, pad_token_id=0), folder)
    return folder


def write_tensors(folder: Path, tensors, *, quantization_config=None, place="top", num_shards=1):
    """Replace the weights of a folder.

    Args:
        folder: a checkpoint whose other files stay.
        tensors: names and values.
        quantization_config: what config.json says.
        place: `"top"` of config.json, or the name of a part.
        num_shards: files to spread the tensors over, so that codes and scales lie apart.
    """
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    (folder / "model.safetensors").unlink(missing_ok=True)
    if num_shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        names = [f"model-{number + 1:05}-of-{num_shards:05}.safetensors" for number in range(num_shards)]
        placed = {name: names[number % num_shards] for number, name in enumerate(sorted(tensors))}
        for file in names:
            part = {name: tensors[name] for name, home in placed.items() if home == file}
            save_file(part, folder / file, metadata={"format": "pt"})
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    if quantization_config is not None:
        file = folder / "config.json"
        config = json.loads(file.read_text())
        (config if place == "top" else config[place])["quantization_config"] = quantization_config
        file.write_text(json.dumps(config))


def random_e8m0(shape, generator, low=110, high=125):
    """Exponents that keep weights of E2M1 codes small."""
    return torch.randint(low, high, shape, dtype=torch.uint8, generator=generator)


def random_bytes(shape, generator):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def logits_of(model, tokens):
    with torch.no_grad():
        return model(tokens).logits

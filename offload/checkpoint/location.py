"""Where a model is: a folder here, or a repository of the Hugging Face hub, of which only what is needed comes.

Without torch.
"""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from .gguf.head import gguf_in, is_gguf
from .hub import Announce, HubName, download_weights, heads_from_hub, hub_name, is_hub_name, say_on_stderr
from .weight_files import INDEX_NAME, ONLY_NAME

# a tokenizer.json has up to some 30 MB, an index of a checkpoint of 100,000 tensors 10 MB
MAX_JSON_BYTES = 64 << 20
SMALL_FILES = (
    "config.json",
    "generation_config.json",
    INDEX_NAME,
    *("tokenizer*", "vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "tekken.json", "*.jinja"),
)
"""What describes a model; a few MB at most."""

QUANTISATION_METHODS = (
    *("mxfp4", "fp8", "mxfp8", "compressed-tensors", "modelopt", "nvfp4", "fbgemm_fp8", "fp4"),
    *("gptq", "awq", "hqq", "bitsandbytes"),
)
"""Values of `quant_method` whose tensors are known by their names."""


def local_name(path_or_id: str | Path) -> Path | None:
    """The folder or GGUF file, if there is one; None for a model id `owner/name`, perhaps with `@revision`.

    Raises:
        ValueError: if it is neither.
    """
    folder = Path(path_or_id)
    if folder.is_dir():
        return folder
    if folder.is_file() and is_gguf(folder):
        return folder
    if folder.is_file():
        raise ValueError(
            f"model {path_or_id}: a file, but no GGUF file; give the folder that holds config.json and the weights"
        )
    if folder.is_absolute() or not is_hub_name(str(path_or_id)):
        raise ValueError(f"model {path_or_id}: no such {'file' if is_gguf(folder) else 'folder'}")
    return None


def local_folder(
    path_or_id: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    announce: Announce = say_on_stderr,
) -> Path:
    """A folder with the model's files, or a GGUF file; a model id is downloaded into huggingface_hub's cache first.

    The description comes first and is checked, then exactly the files that hold the weights, all of one commit.

    Args:
        path_or_id: a folder, a GGUF file, or `owner/name`, `owner/name@revision` or `owner/name/file.gguf` of the hub.
            Of a folder without safetensors files it is the GGUF file in it.
        revision: branch, tag or commit; default: the main branch.
        token: of the hub; default: what huggingface_hub finds (`HF_TOKEN`, or its login).
        local_files_only: use what is in the cache.
        announce: told how many files and bytes will be downloaded, before that begins.

    Raises:
        ValueError: if there is no such folder, the download fails, or the model cannot be offloaded.
    """
    folder = local_name(path_or_id)
    if folder is not None:
        has_weights = is_gguf(folder) or any((folder / name).is_file() for name in (ONLY_NAME, INDEX_NAME))
        return folder if has_weights else gguf_in(folder) or folder
    how: dict[str, Any] = {"token": token, "local_files_only": local_files_only}
    try:
        return _download(hub_name(str(path_or_id), revision), how, announce)
    except ValueError as error:
        if str(error).startswith("model "):
            raise
        raise _not_downloaded(path_or_id, error) from error
    except Exception as error:  # whatever the network, the hub or the disk has to say
        raise _not_downloaded(path_or_id, error) from error


@contextmanager
def heads_of(path_or_id: str | Path) -> Iterator[Path]:
    """A model that can be looked at: as it is here, or with nothing of its files but their heads.

    Yields:
        A folder, or a GGUF file.

    Raises:
        ValueError: if there is no such model, or the hub cannot be reached.
    """
    folder = local_name(path_or_id)
    if folder is not None:
        yield local_folder(folder)
        return
    with ExitStack() as stack:
        try:
            place = stack.enter_context(heads_from_hub(hub_name(str(path_or_id))))
        except Exception as error:  # whatever the network, the hub or the disk has to say
            raise _not_downloaded(path_or_id, error) from error
        yield place


def _download(hub: HubName, how: dict[str, Any], announce: Announce) -> Path:
    from huggingface_hub import snapshot_download

    folder = Path(snapshot_download(hub.repository, revision=hub.revision, allow_patterns=list(SMALL_FILES), **how))
    if hub.gguf is None:
        check_config_file(folder)
    return download_weights(hub, folder, how, announce)


def _not_downloaded(path_or_id: str | Path, error: Exception) -> ValueError:
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "").split(". ")[0]
    return ValueError(
        f"model {path_or_id}: neither a folder here nor a model id that can be downloaded "
        f"({type(error).__name__}: {reason[:200]})"
    )


def check_config_file(folder: Path) -> None:
    """Refuse a model by its config.json alone, before anything large is read.

    Raises:
        ValueError: if it is missing, is not JSON, or names a method of quantisation that is not known.
    """
    config = read_json(folder / "config.json", f"model {folder}: config.json")
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        quantised = part.get("quantization_config")
        method = quantised.get("quant_method") if isinstance(quantised, dict) else None
        if method is not None and method not in QUANTISATION_METHODS:
            raise ValueError(
                f"model {folder}: its weights are quantised ({method}); known are {', '.join(QUANTISATION_METHODS)}, "
                "so save a dequantised copy first"
            )


def read_json(file: Path, what: str) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ValueError: if it is missing, too large or something else; the message begins with `what`.
    """
    if not file.is_file():
        raise ValueError(f"{what} is missing")
    if file.stat().st_size > MAX_JSON_BYTES:
        raise ValueError(f"{what} cannot be read: larger than {MAX_JSON_BYTES} bytes")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{what} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{what} cannot be read: expected an object, got {type(found).__name__}")
    return found

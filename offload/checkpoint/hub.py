"""Models of the Hugging Face hub: what is downloaded of them, said before it begins, and heads without weights.

Without torch.
"""

import glob
import io
import shutil
import struct
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from routing.ground.quantity import format_size

from .gguf.head import PART_NAME, head_bytes
from .weight_files import INDEX_NAME, ONLY_NAME, index_bytes, shard_names

FIRST_BYTES = 128 << 10
"""Asked for at first: most heads of safetensors files are shorter, so that one request each is enough."""
MOST_HEAD_BYTES = 256 << 20
"""More is no head: 100 MB are the limit of safetensors, and the largest vocabularies of GGUF files take 20 MB."""
REQUESTS = 8
"""At a time, for the heads of shards; the hub answers each in some 0.1 s. Other values were not tried."""
HEADS_NEED = ("config.json", "generation_config.json", "hf_quant_config.json", INDEX_NAME)

Announce = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class HubName:
    """A model on the hub.

    Args:
        repository: `owner/name`.
        revision: branch, tag or commit; None is the main branch.
        gguf: a GGUF file in the repository; None for a safetensors checkpoint.
    """

    repository: str
    revision: str | None
    gguf: str | None


def hub_name(text: str, revision: str | None = None) -> HubName:
    """What `owner/name`, `owner/name@revision` or `owner/name/file.gguf` stands for."""
    path, _, named = text.partition("@")
    owner, name, *inside = path.split("/", 2)
    return HubName(repository=f"{owner}/{name}", revision=revision or named or None, gguf=inside[0] if inside else None)


def is_hub_name(text: str) -> bool:
    """Whether a name that is no path here can be a model on the hub."""
    path = text.partition("@")[0]
    parts = path.split("/")
    if path.startswith((".", "~", "/")) or not all(parts) or ".." in parts:
        return False
    return len(parts) == 2 or (len(parts) > 2 and path.endswith(".gguf"))


def say_on_stderr(line: str) -> None:
    """Where `offload.load` says how much it is going to download."""
    print(line, file=sys.stderr, flush=True)


def download_weights(hub: HubName, folder: Path, how: dict[str, Any], announce: Announce) -> Path:
    """Download the files that hold a model's weights, and no others; what is in the cache already does not come again.

    Args:
        hub: repository, revision and, of a GGUF model, its file.
        folder: the snapshot with the files that describe the model, named by its commit.
        how: `token` and `local_files_only`.
        announce: told before it begins how many files and bytes there are.

    Returns:
        The folder, or the GGUF file in it.
    """
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError

    commit = folder.name
    if hub.gguf is not None:
        names = part_names(hub.gguf)
        _announce(hub, names, commit, how, announce)
        for name in names:
            hf_hub_download(hub.repository, name, revision=commit, **how)
        return folder / names[0]
    try:
        _announce(hub, [ONLY_NAME], commit, how, announce)
        hf_hub_download(hub.repository, ONLY_NAME, revision=commit, **how)
    except EntryNotFoundError:
        if (folder / INDEX_NAME).is_file():
            shards = shard_names(folder)
            _announce(hub, shards, commit, how, announce, index_bytes(folder))
            snapshot_download(
                hub.repository, revision=commit, allow_patterns=[glob.escape(shard) for shard in shards], **how
            )
    return folder


def part_names(gguf: str) -> list[str]:
    """The names of all files of a split GGUF model, of which one is given."""
    folder, _, name = gguf.rpartition("/")
    named = PART_NAME.match(name)
    count = int(named["parts"]) if named else 1
    names = [f"{named['stem']}-{part:05d}-of-{count:05d}.gguf" for part in range(1, count + 1)] if named else [name]
    return [f"{folder}/{part}" if folder else part for part in names]


def _announce(
    hub: HubName, names: Sequence[str], commit: str, how: dict[str, Any], announce: Announce, nbytes: int | None = None
) -> None:
    """Say what is going to come, and refuse what the disk has no room for; nothing if all of it is here.

    Raises:
        EntryNotFoundError: if the first file is not in the repository.
        ValueError: if the disk is too small.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError

    here = [name for name in names if isinstance(try_to_load_from_cache(hub.repository, name, revision=commit), str)]
    if how["local_files_only"] or len(here) == len(names):
        return
    if nbytes is None:
        try:
            sizes = [
                get_hf_file_metadata(hf_hub_url(hub.repository, name, revision=commit), token=how["token"]).size or 0
                for name in names
            ]
        except EntryNotFoundError:
            raise
        except Exception:  # the size is a courtesy: the download itself says what is wrong
            sizes = []
        nbytes = sum(sizes)
    left = nbytes * (len(names) - len(here)) // len(names)
    room = shutil.disk_usage(_existing(Path(constants.HF_HUB_CACHE))).free
    if left > room:
        raise ValueError(
            f"model {hub.repository}: {format_size(left)} are to be downloaded, and {constants.HF_HUB_CACHE} has room "
            f"for {format_size(room)}; set HF_HOME to a larger disk"
        )
    size = f", {format_size(left)}" if left else ""
    announce(f"downloading {hub.repository}: {len(names) - len(here)} files{size}")


def _existing(folder: Path) -> Path:
    return next(place for place in (folder, *folder.parents) if place.exists())


@contextmanager
def heads_from_hub(hub: HubName, token: str | bool | None = None) -> Iterator[Path]:
    """A model that can be looked at but not loaded: its files are here with their heads, their size, and no weights.

    A few MB come over the network: the config, the index, and the head of each file by a request for a range.

    Args:
        hub: repository, revision and, of a GGUF model, its file.
        token: of the hub; None is what huggingface_hub finds.

    Yields:
        A folder, or a GGUF file; both go away afterwards.
    """
    from huggingface_hub import HfApi, snapshot_download

    found = HfApi(token=token).model_info(hub.repository, revision=hub.revision)
    if hub.gguf is None:
        patterns = list(HEADS_NEED)
        described = Path(snapshot_download(hub.repository, revision=found.sha, allow_patterns=patterns, token=token))
    with TemporaryDirectory(prefix="expertier-heads-") as place:
        folder = Path(place)
        if hub.gguf is not None:
            names = part_names(hub.gguf)
        else:
            for file in described.iterdir():
                shutil.copyfile(file, folder / file.name)
            is_alone = any(file.rfilename == ONLY_NAME for file in found.siblings or ())
            names = [ONLY_NAME] if is_alone else shard_names(folder)
        with ThreadPoolExecutor(REQUESTS) as pool:
            list(pool.map(lambda name: _save_head(hub, found.sha, name, folder, token), names))
        yield folder if hub.gguf is None else folder / Path(names[0]).name


def _save_head(hub: HubName, commit: str | None, name: str, folder: Path, token: str | bool | None) -> None:
    """A file of the right size that holds only what is before the weights; the rest is a hole."""
    from huggingface_hub import hf_hub_url

    url, count = hf_hub_url(hub.repository, name, revision=commit), FIRST_BYTES
    data, size = _range(url, count, token)
    while (needed := _head_bytes(data, name)) > len(data) < size:
        count = max(2 * count, needed)
        if count > MOST_HEAD_BYTES:
            raise ValueError(f"model {hub.repository}: {name} has no head of a model's file; is it damaged?")
        data, size = _range(url, count, token)
    target = folder / (Path(name).name if hub.gguf is not None else name)
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("wb") as stream:
        stream.write(data[:needed])
        stream.truncate(size)


def _head_bytes(data: bytes, name: str) -> int:
    """Bytes of a file's head, as far as its beginning tells; more than there are, if it is not whole."""
    if name.endswith(".gguf"):
        return head_bytes(io.BytesIO(data), len(data))
    return 8 + int(struct.unpack("<Q", data[:8])[0]) if len(data) >= 8 else len(data) + 1


def _range(url: str, count: int, token: str | bool | None) -> tuple[bytes, int]:
    """The first bytes of a file on the hub, and its size.

    Raises:
        ValueError: if the server does not say how large the file is.
    """
    from huggingface_hub import get_session
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

    headers = {**build_hf_headers(token=token), "Range": f"bytes=0-{count - 1}"}
    with get_session().stream("GET", url, headers=headers, follow_redirects=True) as response:
        hf_raise_for_status(response)
        total = response.headers.get("Content-Range", "").rpartition("/")[2] or response.headers.get(
            "Content-Length", ""
        )
        if not total.isdigit():
            raise ValueError(f"{url}: the server does not say how large the file is")
        data = bytearray()
        # a server that knows no ranges sends everything: no more is read than was asked for
        for piece in response.iter_bytes():
            data += piece
            if len(data) >= count:
                break
    return bytes(data[:count]), int(total)

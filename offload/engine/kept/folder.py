"""Kept prefixes on disk: they survive a restart, and do not take more room than they may."""

import hashlib
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import Full, Queue
from typing import Any

import torch
from transformers.cache_utils import DynamicSlidingWindowLayer

from .cached import CachedTokens, is_plain
from .prefix_file import IDS, SUFFIX, PrefixLabel, read_label, read_prefix, write_prefix
from .prefixes import best

LEAST_WRITTEN = 64
"""Shorter sequences are not written: reading so few tokens again is one step of a prefill; not tuned."""
MOST_PENDING = 2
"""Sequences that wait to be written; a further one is not, because each holds memory that the pool counts as free."""
ABANDONED_S = 3600.0
"""Half-written files of a program that was killed go after an hour; nothing takes so long to write."""

_log = logging.getLogger(__name__)


@dataclass(eq=False)
class _Listed:
    """A file, by what is known without reading it: its tokens answer the questions that a sequence answers."""

    path: Path
    label: PrefixLabel
    token_ids: list[int]
    nbytes: int
    can_go_back: bool
    end_logits_V: None = None

    @property
    def num_canonical(self) -> int:
        return self.label.num_canonical

    def __len__(self) -> int:
        return len(self.token_ids)

    common = CachedTokens.common

    def reachable(self, length: int) -> int:
        """As `CachedTokens.reachable`; a file has no snapshots but its end."""
        return length if self.can_go_back or length == len(self) else 0


class PrefixFolder:
    """A folder of kept prefixes of one model.

    Args:
        folder: made if it is not there.
        most_bytes: of all files; those that were not used for the longest time go first.
        model: the model, whose mark is on each file.
        empty: gives an empty sequence.

    Raises:
        ValueError: if the folder cannot be made or written to.
    """

    def __init__(self, folder: Path, most_bytes: int, model: Any, empty: Callable[[], CachedTokens]) -> None:
        self._folder, self._most_bytes, self._empty = folder, most_bytes, empty
        self._device, self._mark = model.device, mark_of(model)
        self._layers = empty().cache.layers
        self._is_possible = is_plain(empty().cache)
        self._lock = threading.Lock()
        self._listed: list[_Listed] = []
        _make_private(folder)
        self._list_files()
        self._pending: Queue[tuple[str, CachedTokens] | None] = Queue(MOST_PENDING)
        self._writer = threading.Thread(target=self._write_all, name="expertier-prefixes", daemon=True)
        self._writer.start()

    def find(
        self, owner: str, prompt_ids: Sequence[int], piece_tokens: int | None, more_than: int
    ) -> CachedTokens | None:
        """A sequence that saves more tokens of a prompt than `more_than`, read from its file; None without one."""
        with self._lock:
            mine = [one for one in self._listed if one.label.owner == _mark(owner)]
        found, length = best(mine, prompt_ids, piece_tokens)
        return self._load(found) if isinstance(found, _Listed) and length > more_than else None

    def save(self, owner: str, cached: CachedTokens) -> None:
        """Write a sequence by and by, if it is long enough and not too many wait."""
        if not self._is_possible or len(cached) < LEAST_WRITTEN:
            return
        try:
            self._pending.put_nowait((owner, cached))
        except Full:
            _log.info("a prefix of %d tokens is not written: the disk is busy with others", len(cached))

    def close(self) -> None:
        """Write what waits, then end."""
        self._pending.put(None)
        self._writer.join()

    def _list_files(self) -> None:
        for part in self._folder.glob(f".*{SUFFIX}.*.part"):
            if time.time() - _changed_s(part) > ABANDONED_S:
                part.unlink(missing_ok=True)
        for path in sorted(self._folder.glob(f"*{SUFFIX}"), key=_changed_s):
            try:
                label, ids = read_label(path)
                if label.model == self._mark:
                    self._list(path, label, ids.tolist())
            except (OSError, ValueError) as error:
                _log.warning("kept prefix left out: %s", error)

    def _list(self, path: Path, label: PrefixLabel, token_ids: list[int]) -> None:
        windows = [layer.sliding_window for layer in self._layers if isinstance(layer, DynamicSlidingWindowLayer)]
        can_go_back = all(len(token_ids) < window for window in windows)
        self._listed.append(_Listed(path, label, token_ids, path.stat().st_size, can_go_back))

    def _load(self, listed: _Listed) -> CachedTokens | None:
        try:
            label, tensors = read_prefix(listed.path)
            cached = self._rebuilt(label, tensors)
            os.utime(listed.path)
        except (OSError, ValueError, RuntimeError, MemoryError) as error:  # torch raises the latter two without memory
            _log.warning("kept prefix left out: %s", error)
            self._forget(listed, delete=isinstance(error, ValueError))
            return None
        with self._lock:
            self._listed.sort(key=lambda one: one is listed)
        return cached

    def _rebuilt(self, label: PrefixLabel, tensors: dict[str, torch.Tensor]) -> CachedTokens:
        """A sequence from its tensors.

        Raises:
            ValueError: if they do not fit this model.
        """
        cached = self._empty()
        cached.token_ids, cached.num_canonical = tensors[IDS].tolist(), label.num_canonical
        for number, layer in enumerate(cached.cache.layers):
            is_window = isinstance(layer, DynamicSlidingWindowLayer)
            if is_window:
                layer.cumulative_length = len(cached)
            keys, values = (tensors.get(f"{number}.{name}") for name in ("keys", "values"))
            if keys is None and values is None:
                continue
            if keys is None or values is None:
                raise ValueError(f"layer {number} has keys without values, or values without keys")
            length = min(len(cached), layer.sliding_window - 1) if is_window else len(cached)
            if not keys.dim() == values.dim() == 4 or not keys.shape[2] == values.shape[2] == length:
                raise ValueError(f"layer {number} has keys of {list(keys.shape)}; expected {length} positions")
            layer.lazy_initialization(keys.to(self._device), values.to(self._device))
            layer.keys, layer.values = keys.to(self._device), values.to(self._device)
        return cached

    def _write_all(self) -> None:
        """The writing thread."""
        while (item := self._pending.get()) is not None:
            try:
                self._write(*item)
            except Exception as error:  # a full disk, no memory, a bug: later prefixes are tried again
                _log.warning("a prefix could not be kept on disk: %s", error)

    def _write(self, owner: str, cached: CachedTokens) -> None:
        label = PrefixLabel(model=self._mark, owner=_mark(owner), num_canonical=cached.num_canonical)
        tensors = {IDS: torch.tensor(cached.token_ids, dtype=torch.int32)}
        for number, layer in enumerate(cached.cache.layers):
            if layer.is_initialized:
                tensors |= {f"{number}.keys": layer.keys, f"{number}.values": layer.values}
        path = write_prefix(self._folder, label, tensors)
        with self._lock:
            mine = [one for one in self._listed if one.label.owner == label.owner and one.path != path]
            continued = [one for one in mine if one.common(cached.token_ids) == len(one)]
            self._listed = [one for one in self._listed if one.path != path]
            self._list(path, label, list(cached.token_ids))
        for one in continued:
            self._forget(one, delete=True)
        self._shrink()

    def _shrink(self) -> None:
        while self._listed and sum(one.nbytes for one in self._listed) > self._most_bytes:
            self._forget(self._listed[0], delete=True)

    def _forget(self, listed: _Listed, *, delete: bool) -> None:
        with self._lock:
            self._listed = [one for one in self._listed if one is not listed]
        if delete:
            listed.path.unlink(missing_ok=True)


def _changed_s(path: Path) -> float:
    """When a file was written last, in seconds since 1970; 0 if another server has just deleted it."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def mark_of(model: Any) -> str:
    """A mark of a model and of how it computes: its config, the files of its weights, types and arithmetic."""
    folder = Path(str(model.name_or_path))
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    stats = [(file.name, (stat := file.stat()).st_size, stat.st_mtime_ns) for file in files]
    arithmetic = model.offload.runtime.matvecs.arithmetic
    config = model.config.to_json_string(use_diff=False)
    return _mark(json.dumps([config, stats, str(model.dtype), arithmetic, torch.__version__]))


def _mark(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _make_private(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"cannot keep prefixes in {folder}: {error.strerror}; name a folder that can be made"
        ) from error
    if not os.access(folder, os.W_OK):
        raise ValueError(f"cannot keep prefixes in {folder}: it is read-only")

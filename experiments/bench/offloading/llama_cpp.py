"""llama.cpp as a contestant: a GGUF file, mapped from disk and paged in on demand.

Needs `pip install llama-cpp-python gguf`.
"""

import ctypes
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

NOT_INSTALLED = "llama-cpp-python and gguf are not installed"


def is_available() -> bool:
    """Whether llama-cpp-python and gguf are installed."""
    from importlib.util import find_spec

    return find_spec("llama_cpp") is not None and find_spec("gguf") is not None


class LlamaCpp:
    """A GGUF file, running on the CPU.

    Args:
        file: its name.
        context: tokens at most, of all sequences together.
        num_threads: CPU threads for prompts and for decoding alike.
        num_sequences: conversations at most; see `together`.
        is_repacked: whether llama.cpp may copy codes to memory in the order of its kernels, for which all must fit.

    Raises:
        OSError: if llama.cpp cannot load the file.
    """

    def __init__(
        self, file: Path, context: int, num_threads: int, num_sequences: int = 1, *, is_repacked: bool
    ) -> None:
        import llama_cpp

        self._library = llama_cpp
        self._quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._quiet, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        options = llama_cpp.llama_model_default_params()
        options.use_mmap, options.n_gpu_layers, options.use_extra_bufts = True, 0, is_repacked
        self._model = llama_cpp.llama_model_load_from_file(str(file).encode(), options)
        if not self._model:
            raise OSError(f"llama.cpp cannot load {file}")
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = settings.n_batch = max(context, 32)
        settings.n_threads = settings.n_threads_batch = num_threads
        settings.n_seq_max = num_sequences
        self._context = llama_cpp.llama_init_from_model(self._model, settings)
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))

    def __call__(self, ids: list[int]) -> NDArray[np.float32]:
        """Continue with these tokens; gives the logits after the last."""
        tokens = (self._library.llama_token * len(ids))(*ids)
        if self._library.llama_decode(self._context, self._library.llama_batch_get_one(tokens, len(ids))):
            raise RuntimeError("llama.cpp could not decode")
        logits = self._library.llama_get_logits_ith(self._context, -1)
        return np.ctypeslib.as_array(logits, shape=(self._vocabulary,)).copy()

    def forget(self) -> None:
        """Begin anew with an empty context."""
        self._library.llama_memory_clear(self._library.llama_get_memory(self._context), True)

    def together(self, ids: Sequence[Sequence[int]], start: int) -> None:
        """Continue several sequences in one batch, as llama-server does with its places.

        Args:
            ids: the next tokens of each sequence, as many for each.
            start: position of the first of them.
        """
        size = sum(map(len, ids))
        batch = self._library.llama_batch_init(size, 0, 1)
        batch.n_tokens = size
        places = ((sequence, at) for at in range(len(ids[0])) for sequence in range(len(ids)))
        for place, (sequence, at) in enumerate(places):
            batch.token[place], batch.pos[place] = ids[sequence][at], start + at
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, sequence
            batch.logits[place] = at == len(ids[0]) - 1
        failed = self._library.llama_decode(self._context, batch)
        self._library.llama_batch_free(batch)
        if failed:
            raise RuntimeError(f"llama.cpp could not decode {len(ids)} sequences")

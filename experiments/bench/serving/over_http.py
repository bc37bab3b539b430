"""One user over HTTP beside `expertier generate`: each in a program of its own, in turns, on the same prompt.

A replay checkpoint has no tokenizer, so that both programs are given a copy of its folder, of links, with one whose
words are the numbers of its rows.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .measures import Row

READY_S = 600.0
"""Most seconds that a model may take to load; the slowest seen took 20."""
PROGRAM = (sys.executable, "-m", "experiments.cli")


def beside_generate(
    checkpoint: Path, options: Sequence[str], rows: Sequence[int], new_tokens: int, repeats: int
) -> Iterator[Row]:
    """Speed and first token of both, in `repeats` pairs.

    Args:
        checkpoint: folder of a replay checkpoint.
        options: of loading, as both commands have them.
        rows: the prompt, as rows of the checkpoint.
        new_tokens: tokens of each greedy answer.
        repeats: pairs; both run once in each.

    Yields:
        `program` (`generate` or `serve`), `tok_per_s` from the first token to the last, `first_token_s`; of `serve`
        also `first_token_over_s`, what passed between the request and its first token besides reading the prompt.

    Raises:
        RuntimeError: if one of them ends early, or answers differ.
    """
    with tempfile.TemporaryDirectory(prefix="expertier-bench-") as temporary:
        folder = Path(temporary, "model")
        _with_words(checkpoint, folder)
        prompt, answers = " ".join(map(str, rows)), set()
        options = [*options, "--context", str(len(rows) + new_tokens + 64)]
        for repeat in range(repeats):
            for program, run in (("generate", _generate), ("serve", _serve)):
                row, answer = run(folder, options, prompt, new_tokens)
                answers.add(answer)
                yield {"measure": "http", "program": program, "repeat": repeat, **row}
        if len(answers) > 1:
            raise RuntimeError("the answer over HTTP is not that of generate")


def _with_words(checkpoint: Path, folder: Path) -> None:
    """Links to a checkpoint's files, and a tokenizer whose words are numbers."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder.mkdir()
    for file in checkpoint.iterdir():
        os.symlink(file.resolve(), folder / file.name)
    vocab_size = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    words = {str(number): number for number in range(vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def _generate(folder: Path, options: Sequence[str], prompt: str, new_tokens: int) -> tuple[Row, str]:
    report_file = folder.parent / "generate.json"
    wanted = ["--prompt", prompt, "--max-new-tokens", str(new_tokens), "--json", str(report_file)]
    done = subprocess.run([*PROGRAM, "generate", str(folder), *wanted, *options], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"generate ended with {done.returncode}: {done.stderr.strip()[-300:]}")
    report = json.loads(report_file.read_text(encoding="utf-8"))
    return {"tok_per_s": report["tokens_per_second"], "first_token_s": report["prefill_seconds"]}, report[
        "text"
    ].strip()


def _serve(folder: Path, options: Sequence[str], prompt: str, new_tokens: int) -> tuple[Row, str]:
    with _server(folder, ["--reuse", "off", "--lookup", "off", "--parallel", "1", *options]) as client:
        _ask(client, prompt[: prompt.index(" ")], 1)  # threads and modules of the first request of a server
        row, answer = _ask(client, prompt, new_tokens)
    return row, answer


def _ask(client: Any, prompt: str, new_tokens: int) -> tuple[Row, str]:
    before_s = _prefill_s(client)
    request = {"prompt": prompt, "max_tokens": new_tokens, "temperature": 0, "ignore_eos": True, "stream": True}
    started_s, seconds, texts = time.perf_counter(), [], []
    with client.stream("POST", "/v1/completions", json=request) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            for choice in json.loads(line.removeprefix("data: "))["choices"]:
                seconds += [time.perf_counter()] if choice["text"] else []
                texts.append(choice["text"])
    first_s, decode_s = seconds[0] - started_s, seconds[-1] - seconds[0]
    row = {
        "tok_per_s": (len(seconds) - 1) / decode_s if decode_s else None,
        "first_token_s": first_s,
        "first_token_over_s": first_s - (_prefill_s(client) - before_s),
    }
    return row, "".join(texts).strip()


def _prefill_s(client: Any) -> float:
    """Seconds that this server has read prompts for."""
    text, name = client.get("/metrics").text, "expertier:request_prefill_time_seconds_sum"
    found = re.search(rf"^{name}\{{[^}}]*\}} (\S+)$", text, re.MULTILINE)
    if found is None:
        raise RuntimeError(f"/metrics has no {name}")
    return float(found.group(1))


@contextmanager
def _server(folder: Path, options: Sequence[str]) -> Iterator[Any]:
    """A client of a server that is ready; the server ends afterwards."""
    import httpx

    command = [*PROGRAM, "serve", str(folder), "--port", "0", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        with httpx.Client(base_url=_address(process), timeout=READY_S) as client:
            _wait_ready(client)
            yield client
    except httpx.ConnectError as error:
        said = process.stdout.read() if process.stdout else ""
        raise RuntimeError(f"the server has ended: {said.strip()[-300:]}") from error
    finally:
        process.terminate()
        process.communicate()


def _address(process: "subprocess.Popen[str]") -> str:
    """Where a server says that it listens."""
    assert process.stdout is not None
    said = []
    for line in process.stdout:
        if found := re.search(r"http://127\.0\.0\.1:\d+", line):
            return found.group()
        said.append(line)
    raise RuntimeError(f"serve ended before it listened: {''.join(said).strip()[-300:]}")


def _wait_ready(client: Any) -> None:
    end_s = time.perf_counter() + READY_S
    while client.get("/health").status_code != 200:
        if time.perf_counter() > end_s:
            raise RuntimeError(f"the server was not ready after {READY_S:.0f} s")
        time.sleep(0.1)

"""A real, plain engine for tests of the server: one thread steps a tiny model, one request after the other."""

import queue
import threading
import time

import torch

from offload.engine.events import Finished, NotReady, Position, QueueFull, TokenEvent, Usage
from offload.engine.stream import Stream


class SmallEngine:
    """Behind the contract of `offload.engine`, without its schedule, prefixes and budget."""

    def __init__(self, model, end_ids=(), most_queued=16, step_s=0.0):
        self.model, self.end_ids, self.most_queued, self.step_s = model, frozenset(end_ids), most_queued, step_s
        self.steps = 0
        self.active = 0
        self.is_closed = False
        self._waiting = queue.Queue()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def submit(self, request):
        if self.is_closed:
            raise NotReady("the engine is closed")
        if self._waiting.qsize() >= self.most_queued:
            raise QueueFull(f"{self.most_queued} requests wait already", retry_after_s=1.2)
        job = _Job(request)
        self._waiting.put(job)
        return job.stream

    def close(self):
        self.is_closed = True
        self._waiting.put(None)
        self._thread.join(10)

    def _run(self):
        while (job := self._waiting.get()) is not None:
            self.active += 1
            try:
                self._answer(job)
            except Exception as error:
                job.finish("error", f"{type(error).__name__}: {error}")
            self.active -= 1

    @torch.no_grad()
    def _answer(self, job):
        request, past = job.request, None
        job.state = "prefill"
        ids = torch.tensor([request.prompt_ids])
        generator = torch.Generator()
        generator.manual_seed(request.sampling.seed if request.sampling.seed is not None else time.time_ns() % 2**63)
        for index in range(request.max_new_tokens):
            if job.is_cancelled:
                return job.finish("cancelled")
            out = self.model(input_ids=ids, past_key_values=past, use_cache=True)
            self.steps += 1
            time.sleep(self.step_s)
            past, job.state = out.past_key_values, "decode"
            token = _choose(out.logits[0, -1].float(), request, generator)
            job.stream.put(TokenEvent(index=index, token_id=token[0], logprob=token[1], top_logprobs=token[2]))
            job.count = index + 1
            is_end = token[0] in self.end_ids and not request.ignore_end
            if is_end or token[0] in request.stop_ids or (request.is_stop is not None and request.is_stop(token[0])):
                return job.finish("stop")
            ids = torch.tensor([[token[0]]])
        return job.finish("length")


class _Job:
    def __init__(self, request):
        self.request, self.count, self.is_cancelled, self.state = request, 0, False, "queued"
        self.stream = Stream(self.cancel, self.position)

    def cancel(self):
        self.is_cancelled = True

    def position(self):
        return Position(state=self.state, ahead=0, prefilled_tokens=0, prompt_tokens=len(self.request.prompt_ids))

    def finish(self, reason, message=""):
        usage = Usage(prompt_tokens=len(self.request.prompt_ids), completion_tokens=self.count)
        self.stream.put(Finished(reason=reason, usage=usage, message=message))


def _choose(logits, request, generator):
    sampling = request.sampling
    logprobs = logits.log_softmax(-1)
    for token, bias in sampling.logit_bias.items():
        logits[token] = -torch.inf if bias <= -100 else logits[token] + bias
    if request.constraint is not None:
        allowed = torch.from_numpy(request.constraint.allowed_V())[: len(logits)]
        logits[~allowed] = -torch.inf
    if sampling.is_greedy:
        token = int(logits.argmax())
    else:
        token = int(torch.multinomial((logits / sampling.temperature).softmax(-1), 1, generator=generator))
    if request.constraint is not None:
        request.constraint.accept(token)
    if sampling.top_logprobs is None:
        return token, None, ()
    top = logprobs.topk(max(sampling.top_logprobs, 1))
    pairs = list(zip(top.indices.tolist(), top.values.tolist(), strict=True))[: sampling.top_logprobs]
    return token, float(logprobs[token]), tuple(pairs)

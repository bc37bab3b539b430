"""The engine's thread: lets requests in, chooses and computes steps, chooses tokens, ends requests."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from ..checkpoint.experts import experts_modules
from .admission import Admission
from .counters import Tally
from .events import Reads, Reason
from .packing import Piece
from .planning.schedule import Candidate, Schedule
from .request import ConstraintError
from .sequence import RunningSequence
from .step import ModelSteps


class AbandonedPrefillError(Exception):
    """The request whose prompt is being read was cancelled between two layers."""


class Loop:
    """Steps of one model for all requests that run.

    Args:
        steps: calls the model.
        admission: the running requests.
        schedule: chooses among them.
        piece_tokens: P, tokens of one piece of a prompt.
        tally: counts what is done.
    """

    def __init__(
        self,
        steps: ModelSteps,
        admission: Admission,
        schedule: Schedule,
        *,
        piece_tokens: int,
        tally: Tally,
    ) -> None:
        self.admission, self.schedule, self.tally = admission, schedule, tally
        self._steps, self._piece_tokens = steps, piece_tokens
        self._runtime = steps.model.offload.runtime
        self._counters = self._runtime.counters
        self._reading: RunningSequence | None = None
        """Whose prompt the model is reading now, if steps of others may run between its layers."""
        self._read_since_s = 0.0
        self._read_in_steps = Reads()
        self._experts = list(experts_modules(steps.model).values())

    def close(self) -> None:
        """Write what is to be kept."""
        self.admission.close()

    def moment(self) -> dict[str, Any]:
        """What runs now and what was read, for the engine's counters; from any thread."""
        admission, layers = self.admission, self._counters.layers
        running = list(admission.running)
        return {
            "running": len(running),
            "reading": sum(one.state == "prefill" for one in running),
            "kv_capacity": admission.pool.capacity,
            "kv_reserved": admission.pool.reserved,
            "kv_in_use": sum(len(cached) for one in running if (cached := one.cached) is not None),
            "kv_kept": admission.pool.kept,
            "is_together": self.schedule.is_together,
            "can_pack": self.schedule.may_pack,
            "hits_L": tuple(layer.hits for layer in layers),
            "misses_L": tuple(layer.misses for layer in layers),
            "bytes_read_L": tuple(layer.bytes_read for layer in layers),
            "disk_busy_s": self._runtime.store.busy_s,
        }

    def step(self) -> None:
        """Compute one step, if anybody runs."""
        self._end_cancelled()
        for sequence in [one for one in self.admission.running if one.state == "prefill" and not one.prompt_left]:
            self._start_from_kept(sequence)
        of = {sequence.key: sequence for sequence in self.admission.running}
        plan = self.schedule.choose([_candidate(one) for one in of.values()], time.monotonic())
        if plan.prefill is not None:
            self._read(of[plan.prefill], [of[key] for key in plan.decode])
        elif plan.decode:
            self._decode([of[key] for key in plan.decode])

    def _end_cancelled(self, but: RunningSequence | None = None) -> None:
        for sequence in [one for one in self.admission.running if one.is_cancelled and one is not but]:
            self.admission.end(sequence, "cancelled")

    def _start_from_kept(self, sequence: RunningSequence) -> None:
        """Another request stands at the end of the same prompt: its logits are this one's."""
        logits_V = sequence.tokens.end_logits_V
        assert logits_V is not None
        self._take(sequence, logits_V)

    def _read(self, sequence: RunningSequence, riders: Sequence[RunningSequence]) -> None:
        """Compute a piece of one prompt, and a token of each rider with it."""
        token_ids = sequence.next_piece(self._piece_tokens)
        others_wait = not riders and bool(self._decoding())
        pieces = [Piece(cached=sequence.tokens, token_ids=token_ids), *map(_token_of, riders)]
        started_s = self._read_since_s = time.monotonic()
        decode_before_s = self.tally.decode_s
        # a step between two layers could not compute a rider's next token before this one
        with nullcontext() if riders else self._interrupted(sequence):
            logits = self._run(pieces, [sequence, *riders])
        # what other answers took between the layers is theirs
        seconds = time.monotonic() - started_s - (self.tally.decode_s - decode_before_s)
        self.tally.prefill_s += seconds
        self.schedule.note_reading(time.monotonic() - self._read_since_s, others_wait=others_wait)
        if logits is None:
            return
        self.schedule.note_piece(len(token_ids), seconds)
        sequence.note_read(token_ids, self._piece_tokens)
        if not sequence.prompt_left:
            sequence.tokens.end_logits_V = logits[0][-1]
            self._take(sequence, logits[0][-1])
        for rider, logits_NV in zip(riders, logits[1:], strict=True):
            self._take(rider, logits_NV[-1])

    @contextmanager
    def _interrupted(self, sequence: RunningSequence) -> Iterator[None]:
        """Within, steps of others may run between the layers of a prompt's piece.

        Steps of single tokens, which nothing interrupts, call no module that a hook is on.
        """
        hooks = [module.register_forward_pre_hook(self._between_layers) for module in self._experts]
        self._reading = sequence
        try:
            yield
        finally:
            self._reading = None
            for hook in hooks:
                hook.remove()

    def _between_layers(self, module: Any, args: Any) -> None:
        """Before a layer of a prompt's piece: cancel, and pay the running answers their share of the time."""
        if (sequence := self._reading) is None:
            return
        if sequence.is_cancelled:
            raise AbandonedPrefillError
        window = self._runtime.window
        if window is not None and window.plan.streamed:  # a step within a layer would take the memory of its weights
            return
        self._reading = None  # the steps below are not to be interrupted themselves
        self._end_cancelled(but=sequence)
        spent_s = time.monotonic() - self._read_since_s
        self.schedule.note_reading(spent_s, others_wait=bool(self._decoding()))
        while (decoding := self._decoding()) and self.schedule.owes_decoding and not sequence.is_cancelled:
            keys = set(self.schedule.choose_decoding([_candidate(one) for one in decoding]))
            self._decode([one for one in decoding if one.key in keys])
            self._end_cancelled(but=sequence)
        self._reading, self._read_since_s = sequence, time.monotonic()

    def _decoding(self) -> list[RunningSequence]:
        return [one for one in self.admission.running if one.state == "decode"]

    def _decode(self, sequences: Sequence[RunningSequence]) -> None:
        """Compute the next token of each, or several of one whose next tokens can be guessed."""
        draft = sequences[0].draft() if len(sequences) == 1 else []
        pieces = [_token_of(sequence) for sequence in sequences]
        if draft:
            tokens = sequences[0].tokens
            tokens.begin_trial()
            ids = [sequences[0].last_token, *draft]
            pieces = [Piece(cached=tokens, token_ids=ids, num_logits=len(ids), by_row=True)]
        started_s, stall_s, misses = time.monotonic(), self._counters.stall_s, self._reads().misses
        logits = self._run(pieces, sequences)
        seconds = time.monotonic() - started_s
        self.tally.decode_s += seconds
        if logits is None:
            return
        self.tally.rows_total += sum(len(piece.token_ids) for piece in pieces)
        if draft:
            self._take_draft(sequences[0], draft, logits[0], seconds)
            return
        per_layer = (self._reads().misses - misses) / max(len(self._counters.layers), 1)
        self.schedule.note_decoding(len(sequences), seconds, self._counters.stall_s - stall_s, per_layer)
        for sequence, logits_NV in zip(sequences, logits, strict=True):
            if len(sequences) == 1 and sequence.lookup is not None:
                sequence.lookup.note_alone(seconds)
            self._take(sequence, logits_NV[-1])

    def _take_draft(
        self, sequence: RunningSequence, draft: Sequence[int], logits_NV: torch.Tensor, seconds: float
    ) -> None:
        """Take tokens as long as each is what was guessed, and one more; the same that single steps would give."""
        accepted, end = 0, None
        for guess, logits_V in zip([*draft, None], logits_NV, strict=True):
            end = self._choose(sequence, logits_V)
            if end is not None or sequence.last_token != guess:
                break
            accepted += 1
        sequence.tokens.end_trial(len(draft) - accepted)
        assert sequence.lookup is not None
        sequence.lookup.note_proposal(len(draft), accepted, seconds)
        self.schedule.pay(seconds)
        if end is not None:
            self.admission.end(sequence, *end)

    def _run(self, pieces: Sequence[Piece], sequences: Sequence[RunningSequence]) -> list[torch.Tensor] | None:
        """A step; None if it failed, in which case its requests have ended, each with the reason."""
        self.tally.steps_total += 1
        try:
            return self._counted(pieces, sequences)
        except AbandonedPrefillError:
            self._fail(sequences, "cancelled", "")
        except Exception as error:  # a damaged file, no memory, a bug: these requests end, the engine goes on
            self._fail(sequences, "error", one_line(error))
        return None

    def _counted(self, pieces: Sequence[Piece], sequences: Sequence[RunningSequence]) -> list[torch.Tensor]:
        """A step whose tokens and experts are counted; steps between its layers have counted theirs."""
        before, nested = self._reads(), self._read_in_steps
        logits = [logits.float().cpu() for logits in self._steps.run(pieces)]
        reads = self._reads() - before - (self._read_in_steps - nested)
        self._read_in_steps += reads
        for sequence in sequences:
            sequence.reads += reads
        self.tally.step_tokens.note(sum(len(piece.token_ids) for piece in pieces))
        self.tally.step_experts.note((reads.hits + reads.misses) / max(len(self._counters.layers), 1))
        return logits

    def _reads(self) -> Reads:
        layers = self._counters.layers
        return Reads(
            hits=sum(layer.hits for layer in layers),
            misses=sum(layer.misses for layer in layers),
            nbytes=sum(layer.bytes_read for layer in layers),
        )

    def _fail(self, sequences: Sequence[RunningSequence], reason: Reason, message: str) -> None:
        for sequence in sequences:
            sequence.is_whole = False
            self.admission.end(sequence, reason, message)

    def _take(self, sequence: RunningSequence, logits_V: torch.Tensor) -> None:
        """The next token of one request, which may end it."""
        end = self._choose(sequence, logits_V)
        if end is not None:
            self.admission.end(sequence, *end)

    def _choose(self, sequence: RunningSequence, logits_V: torch.Tensor) -> tuple[Reason, str] | None:
        """Choose the next token; why the request ends with it, or None."""
        try:
            reason = sequence.take_token(logits_V)
        except ConstraintError as error:
            return "invalid", str(error)
        except Exception as error:  # its constraint or `is_stop` may raise anything; others must not suffer
            return "error", one_line(error)
        self.tally.completion_tokens_total += 1
        return None if reason is None else (reason, "")


def _candidate(sequence: RunningSequence) -> Candidate:
    return Candidate(key=sequence.key, prompt_left=sequence.prompt_left, since_s=sequence.served_s)


def _token_of(sequence: RunningSequence) -> Piece:
    return Piece(cached=sequence.tokens, token_ids=[sequence.last_token], by_row=True)


def one_line(error: Exception) -> str:
    """An error as one line for the one who asked; its class where the text alone may say nothing."""
    text = " ".join(str(error).split())
    return text if isinstance(error, ValueError | OSError) and text else f"{type(error).__name__}: {text}"

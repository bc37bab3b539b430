"""Schedule, pool, queue and lookup, without a model: simulated on routings, checked against brute force."""

import random
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offload.cache.catalogue import make_cache
from offload.engine.planning.lookup import PAUSE_TOKENS, TRIES, Lookup
from offload.engine.planning.pool import Departures, FairQueue, TokenPool
from offload.engine.planning.rates import HOPELESS_STEPS, ExpertLoad
from offload.engine.planning.schedule import LONGEST_GAP_S, Candidate, Schedule

EXPERTS, TOP_K = 32, 4
POLICY = "lru"
"""It forgets at once what the other way of serving has left; `learned` takes some hundred tokens."""
READ_S = 0.01
COMPUTE_S = 0.002
RESIDENT_S = 0.006


class User:
    """Tokens that prefer the experts of the token before, as those of real models do."""

    def __init__(self, seed):
        self._chance = random.Random(seed)
        self._favourites = self._chance.sample(range(EXPERTS), 10)
        self._last = self._favourites[:TOP_K]

    def next_experts(self):
        chosen = [expert for expert in self._last if self._chance.random() < 0.5]
        while len(chosen) < TOP_K:
            pool = self._favourites if self._chance.random() < 0.8 else range(EXPERTS)
            expert = self._chance.choice(pool)
            if expert not in chosen:
                chosen.append(expert)
        self._last = chosen
        return chosen


@dataclass
class Machine:
    """One layer's cache, and a clock: reads and products of a step overlap."""

    cache: object
    slots: int
    clock_s: float = 0.0

    def step(self, experts):
        touched = list(dict.fromkeys(experts))
        touched.sort(key=lambda expert: expert not in self.cache)
        misses = 0
        for start in range(0, len(touched), self.slots):
            wave = touched[start : start + self.slots]
            misses += len(wave) - self.cache.access(wave, [0] * len(wave), [1.0] * len(wave))
        disk_s, compute_s = misses * READ_S, len(touched) * COMPUTE_S
        seconds = max(disk_s, compute_s) + RESIDENT_S
        self.clock_s += seconds
        return seconds, max(disk_s - compute_s, 0.0), misses


def simulate(mode, users, slots, tokens=3000):
    """Tokens per second, and the longest time between two tokens of a user."""
    load = ExpertLoad(num_experts=EXPERTS, top_k=TOP_K, slots=slots, expert_share=TOP_K * COMPUTE_S / 0.014)
    schedule = Schedule(mode, load, longest_wait_s=15.0, decode_share=0.3, may_pack=True, piece_tokens=512)
    machine = Machine(make_cache(POLICY, slots, EXPERTS), slots)
    people = [User(number) for number in range(users)]
    served_s, longest_s, done = [0.0] * users, 0.0, 0
    while done < tokens:
        waiting = [Candidate(key=key, prompt_left=0, since_s=served_s[key]) for key in range(users)]
        chosen = schedule.choose(waiting, machine.clock_s).decode
        seconds, stall_s, misses = machine.step([expert for key in chosen for expert in people[key].next_experts()])
        schedule.note_decoding(len(chosen), seconds, stall_s, misses)
        for key in chosen:
            longest_s, served_s[key] = max(longest_s, machine.clock_s - served_s[key]), machine.clock_s
        done += len(chosen)
    return done / machine.clock_s, longest_s


@pytest.mark.parametrize(
    ("users", "slots", "better"),
    [
        (4, 8, "turns"),
        (3, 5, "turns"),
        (4, 32, "together"),
        (16, 6, "together"),
        (2, 12, "together"),
        (8, 12, "together"),
    ],
)
def test_the_schedule_finds_the_quicker_way(users, slots, better):
    rates = {mode: simulate(mode, users, slots)[0] for mode in ("turns", "together", "auto")}
    other = "turns" if better == "together" else "together"
    assert rates[better] > 1.05 * rates[other]
    assert rates["auto"] > 0.95 * rates[better]


def steps_together(step_s, tokens=600):
    """Steps of four users, when one of a user alone takes 0.28 s and each of all four `step_s`."""
    load = ExpertLoad(num_experts=EXPERTS, top_k=TOP_K, slots=10, expert_share=0.5)
    schedule = Schedule("auto", load, longest_wait_s=15.0, decode_share=0.3, may_pack=True, piece_tokens=512)
    now_s, served, count, done = 0.0, dict.fromkeys(range(4), 0.0), 0, 0
    while done < tokens:
        chosen = schedule.choose([Candidate(key=key, prompt_left=0, since_s=at) for key, at in served.items()], now_s)
        is_together = len(chosen.decode) > 1
        seconds, stall_s, misses = (step_s, step_s - 0.25, 7.0) if is_together else (0.28, 0.18, 1.1)
        schedule.note_decoding(len(chosen.decode), seconds, stall_s, misses)
        now_s, done, count = now_s + seconds, done + len(chosen.decode), count + is_together
        served |= dict.fromkeys(chosen.decode, now_s)
    return count


def test_steps_together_that_are_slower_than_turns_are_given_up_soon():
    """Four users at 10 of 32 slots, as measured: 1.74 s together, 0.28 s alone."""
    assert steps_together(1.74) == HOPELESS_STEPS
    assert steps_together(0.9) > 4 * HOPELESS_STEPS


def test_nobody_waits_longer_for_a_turn_than_he_should():
    rate, longest_s = simulate("turns", 8, 8)
    # a turn ends within the wait; the first turns are longer, because no step was measured
    assert longest_s < 15.0 + 64 * 8 * (1 / rate)
    load = ExpertLoad(num_experts=EXPERTS, top_k=TOP_K, slots=8, expert_share=0.5)
    schedule = Schedule("turns", load, longest_wait_s=15.0, decode_share=0.3, may_pack=False, piece_tokens=512)
    schedule.note_decoding(1, 0.28, 0.2, 1.3)
    assert schedule.turn_tokens(1) == 64
    assert schedule.turn_tokens(4) == int(15 / (0.28 * 3))
    schedule.note_decoding(1, 1000.0, 0.2, 1.3)
    assert schedule.turn_tokens(4) == 1


def test_turns_go_round():
    load = ExpertLoad(num_experts=EXPERTS, top_k=TOP_K, slots=8, expert_share=0.5)
    schedule = Schedule("turns", load, longest_wait_s=1.0, decode_share=0.3, may_pack=True, piece_tokens=512)
    now_s, served, order = 0.0, {1: 0.0, 2: 0.0, 3: 0.0}, []
    for _ in range(30):
        (key,) = schedule.choose(
            [Candidate(key=one, prompt_left=0, since_s=served[one]) for one in served], now_s
        ).decode
        now_s += 0.1
        schedule.note_decoding(1, 0.1, 0.05, 1.0)
        served[key] = now_s
        order.append(key)
    assert order[:16] == [1] * 5 + [2] * 5 + [3] * 5 + [1]


def test_misses_of_the_model_are_near_those_of_a_replayed_trace():
    """Measured by replaying recorded routing of GPT-OSS-20B (32 experts, top-4): misses per token and layer."""
    alone = {4: 2.30, 8: 1.31, 10: 1.00, 16: 0.42}
    measured = {(8, 4): 1.70, (8, 8): 1.44, (8, 16): 0.98, (16, 8): 0.65, (16, 16): 0.54, (4, 8): 1.85}
    measured |= {(8, 2): 1.64, (10, 2): 1.29, (10, 4): 1.38, (16, 2): 0.58, (16, 4): 0.66}
    for (slots, users), expected in measured.items():
        load = ExpertLoad(num_experts=32, top_k=4, slots=slots, expert_share=0.5)
        assert load.misses(users, alone[slots]) / users == pytest.approx(expected, rel=0.2)
        assert load.misses(1, alone[slots]) == pytest.approx(alone[slots])
    assert ExpertLoad(num_experts=32, top_k=4, slots=32, expert_share=0.5).misses(8, 0.0) == 0


def reading_schedule(piece_s=6.0, may_pack=True):
    load = ExpertLoad(num_experts=EXPERTS, top_k=TOP_K, slots=8, expert_share=0.5)
    schedule = Schedule("auto", load, longest_wait_s=15.0, decode_share=0.3, may_pack=may_pack, piece_tokens=512)
    schedule.note_piece(512, piece_s)
    return schedule


def test_answers_keep_their_share_while_prompts_are_read():
    schedule = reading_schedule()
    assert not schedule.rides(5000)  # pieces are too long to wait for
    people = [Candidate(key=1, prompt_left=0, since_s=0.0), Candidate(key=2, prompt_left=5000, since_s=0.0)]
    reading_s = decoding_s = 0.0
    for step in range(600):
        plan = schedule.choose(people, float(step))
        if plan.prefill is None:
            schedule.note_decoding(1, 0.25, 0.2, 1.0)
            decoding_s += 0.25
        else:
            schedule.note_reading(0.5, others_wait=True)
            reading_s += 0.5
    assert decoding_s / (reading_s + decoding_s) == pytest.approx(0.3, abs=0.02)


def test_answers_ride_along_with_short_pieces_and_nobody_is_owed_when_none_waits():
    schedule = reading_schedule(piece_s=LONGEST_GAP_S / 2)
    people = [Candidate(key=1, prompt_left=0, since_s=0.0), Candidate(key=2, prompt_left=50, since_s=0.0)]
    plan = schedule.choose(people, 0.0)
    assert (plan.prefill, plan.decode) == (2, (1,))
    schedule.note_piece(5, 9.0)
    assert schedule.rides(512)  # a short piece says nothing of long ones
    new = reading_schedule(piece_s=0.1)
    new._piece_tokens = 1024
    assert new.rides(512)
    assert not new.rides(1024)  # nobody knows how long it takes
    schedule.note_reading(5.0, others_wait=True)
    assert schedule.choose(people[1:], 0.0).prefill == 2
    assert not schedule.owes_decoding


def test_a_short_prompt_is_read_first_until_the_long_one_has_waited_long_enough():
    schedule = reading_schedule()
    people = [Candidate(key=1, prompt_left=5000, since_s=0.0), Candidate(key=2, prompt_left=50, since_s=9.0)]
    assert schedule.choose(people, 10.0).prefill == 2
    assert schedule.choose(people, 16.0).prefill == 1


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 60)), max_size=60))
def test_the_pool_never_gives_more_than_it_has(actions):
    pool, taken = TokenPool(100), {}
    for key, tokens in actions:
        if key in taken:
            pool.give(key)
            del taken[key]
        elif tokens <= 100 - sum(taken.values()):
            pool.take(key, tokens)
            taken[key] = tokens
        else:
            with pytest.raises(ValueError, match="cannot take"):
                pool.take(key, tokens)
        assert pool.reserved == sum(taken.values()) <= 100
        assert pool.free == 100 - pool.reserved


@dataclass(frozen=True)
class Item:
    owner: str
    number: int


@given(st.lists(st.sampled_from("abc"), max_size=30))
def test_the_queue_is_fair_between_owners_and_keeps_the_order_of_each(owners):
    queue, items = FairQueue(), [Item(owner, number) for number, owner in enumerate(owners)]
    for item in items:
        queue.add(item)
    assert len(queue) == len(items)
    served = []
    while len(queue):
        item = next(iter(queue))
        queue.serve(item)
        served.append(item)
    for owner in set(owners):
        assert [item for item in served if item.owner == owner] == [item for item in items if item.owner == owner]
    # within any first part, nobody who still waits is behind another by more than one
    for length in range(len(served) + 1):
        counts = {owner: sum(item.owner == owner for item in served[:length]) for owner in set(owners)}
        waiting = [counts[owner] for owner in counts if counts[owner] < owners.count(owner)]
        assert not waiting or max(waiting) - min(waiting) <= 1


def test_retry_after_is_what_is_left_of_the_usual_time_between_two_ends():
    departures = Departures(0.0)
    departures.note_start(100.0, is_first=True)
    assert departures.expected_s(103.0) == 3.0
    departures.note_end(110.0)
    assert departures.expected_s(112.0) == 8.0
    assert departures.expected_s(125.0) == 15.0
    assert departures.expected_s(5000.0) == 120.0
    assert departures.expected_s(110.0 + 9.9) == 1.0


def brute_force(ids, most):
    """The tokens that followed the latest earlier place of the longest of the last 4, 3 or 2 tokens."""
    for length in (4, 3, 2):
        if length > len(ids):
            continue
        gram = ids[-length:]
        for end in range(len(ids) - 1, length - 1, -1):
            if ids[end - length : end] == gram:
                return ids[end : end + min(most, 4)]
    return []


@settings(max_examples=200)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(0, 6))
def test_proposals_are_what_followed_the_same_tokens_before(ids, most):
    lookup = Lookup(ids[:3], is_gated=False)
    lookup.extend(ids[3:])
    assert lookup.propose(most) == (brute_force(ids, most) if most else [])


def test_proposals_stop_where_they_do_not_pay_and_come_back_later():
    lookup = Lookup([1, 2, 3] * 10)
    lookup.note_alone(1.0)
    for _ in range(TRIES):
        assert lookup.propose(4)
        lookup.note_proposal(4, 1, 3.0)  # two tokens in the time of three
        lookup.extend([1, 2])
    assert lookup.utility <= 1.0
    assert not lookup.propose(4)
    lookup.extend([1, 2, 3] * (PAUSE_TOKENS // 3 + 1))
    for _ in range(3 * TRIES):
        assert lookup.propose(4)
        lookup.note_proposal(4, 4, 3.0)
    assert lookup.utility == pytest.approx(5 / 3)
    assert (lookup.num_proposed, lookup.num_accepted) == (16 * TRIES, 13 * TRIES)

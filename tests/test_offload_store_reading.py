"""Reading threads: order, errors, cancellation, and a clean end."""

import subprocess
import sys
import textwrap
import threading
import time
from queue import SimpleQueue

import pytest

from offload.store.reading import ReadingThreads, Ticket


def test_demand_goes_before_what_may_be_needed_later():
    threads, landed, order, gate = ReadingThreads(1), SimpleQueue(), [], threading.Event()
    threads.submit(Ticket(0, 0, 0, 1, landed), [gate.wait])
    for number in (1, 2):
        threads.submit(Ticket(0, number, 0, 1, landed), [lambda number=number: order.append(number)], is_demand=False)
    threads.submit(Ticket(0, 3, 0, 1, landed), [lambda: order.append(3)])
    gate.set()
    for _ in range(4):
        landed.get(timeout=5)
    assert order == [3, 1, 2]
    threads.close()


def test_a_read_under_way_is_counted_before_it_ends():
    threads, landed, begun, gate = ReadingThreads(1), SimpleQueue(), threading.Event(), threading.Event()
    threads.submit(Ticket(0, 0, 0, 1, landed), [lambda: (begun.set(), gate.wait())])
    begun.wait(5)
    earlier = threads.busy_s
    time.sleep(0.02)
    assert threads.busy_s - earlier >= 0.02
    gate.set()
    threads.close()


def test_promotion():
    threads, landed, order, gate = ReadingThreads(1), SimpleQueue(), [], threading.Event()
    threads.submit(Ticket(0, 0, 0, 1, landed), [gate.wait])
    tickets = [Ticket(0, number, 0, 1, landed) for number in (1, 2)]
    for number, ticket in enumerate(tickets, start=1):
        threads.submit(ticket, [lambda number=number: order.append(number)], is_demand=False)
    threads.promote(tickets[1])
    gate.set()
    for _ in range(3):
        landed.get(timeout=5)
    assert order == [2, 1]
    threads.close()


def test_a_ticket_lands_once_when_all_its_jobs_are_done_and_keeps_the_first_error():
    threads, landed = ReadingThreads(2), SimpleQueue()

    def fail():
        raise OSError("no disk")

    ticket = Ticket(1, 2, 3, 3, landed)
    threads.submit(ticket, [fail, lambda: None, lambda: None])
    assert landed.get(timeout=5) is ticket
    assert isinstance(ticket.error, OSError)
    assert ticket.is_finished
    assert landed.empty()
    threads.close()


def test_cancelled_jobs_do_not_run():
    threads, landed, ran, gate = ReadingThreads(1), SimpleQueue(), [], threading.Event()
    threads.submit(Ticket(0, 0, 0, 1, landed), [gate.wait])
    ticket = Ticket(0, 1, 0, 1, landed)
    threads.submit(ticket, [lambda: ran.append(1)])
    ticket.is_cancelled = True
    gate.set()
    ticket.wait()
    assert not ran
    threads.close()


def test_closing_ends_the_threads_and_what_waits():
    threads, landed, gate = ReadingThreads(1), SimpleQueue(), threading.Event()
    threads.submit(Ticket(0, 0, 0, 1, landed), [gate.wait])
    waiting = Ticket(0, 1, 0, 1, landed)
    threads.submit(waiting, [lambda: None])
    threading.Timer(0.05, gate.set).start()
    threads.close()
    waiting.wait()
    assert isinstance(waiting.error, RuntimeError)
    assert not any(thread.is_alive() for thread in threads._threads)
    with pytest.raises(ValueError, match="at least 1 reading thread"):
        ReadingThreads(0)


@pytest.mark.parametrize("ending", ["pass", "raise ValueError('done')", "sys.exit(3)"])
def test_the_interpreter_ends_with_threads_alive(ending):
    code = f"""
        import sys, time
        from queue import SimpleQueue
        from offload.store.reading import ReadingThreads, Ticket
        threads = ReadingThreads(3)
        threads.submit(Ticket(0, 0, 0, 1, SimpleQueue()), [lambda: time.sleep(0.1)])
        {ending}
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=20, check=False
    )
    assert done.returncode == {"pass": 0, "sys.exit(3)": 3}.get(ending, 1)
    assert "Fatal" not in done.stderr

"""The server's worker: what waits, what is cancelled, and what happens when the model fails."""

import threading

import pytest

from examples.mimo.generation.engine import TokenOutput
from examples.mimo.generation.scheduler import Answer, Piece
from examples.mimo.serving.worker import QueueFullError, Worker, WorkerFailedError
from tests.helpers.served import at_work, until


class Counting:
    """Answers that take so many steps as their sample says; "start" and "step" fail there."""

    def __init__(self):
        self.left, self.most, self.gate = {}, 0, threading.Semaphore(0)
        self.started, self.is_broken = [], False

    def scheduler(self):
        return self

    def __len__(self):
        return len(self.left)

    def start(self, requests):
        self.started.append([number for number, _, _ in requests])
        self.left |= {number: sample for number, sample, _ in requests}
        self.most = max(self.most, len(self.left))
        if "start" in self.left.values():
            raise MemoryError("no room for\nthis prompt")
        return []

    def cancel(self, number):
        self.left.pop(number, None)

    def abort(self, numbers=None):
        for number in list(self.left if numbers is None else numbers):
            self.left.pop(number, None)

    def probe(self):
        if self.is_broken:
            raise RuntimeError("a model that is broken")
        return []

    def step(self):
        if self.left:
            self.gate.acquire()
        if "step" in self.left.values():
            raise RuntimeError("a model that fails")
        self.left = {number: left - 1 for number, left in self.left.items()}
        done = [number for number, left in self.left.items() if not left]
        self.left = {number: left for number, left in self.left.items() if left}
        return [Piece(number, "", Answer(str(number), [], "stop")) for number in done]


@pytest.fixture
def worker(build_model):
    return Worker(Counting(), max_batch=2, max_waiting=3)


def end(worker, thread):
    worker.stop()
    thread.join(timeout=120)
    assert not thread.is_alive()
    assert worker.num_running == worker.num_waiting == 0


def test_so_many_at_once_and_so_many_more_wait(worker):
    heard = []
    numbers = [worker.submit(2, None, heard.append) for _ in range(3)]
    with pytest.raises(QueueFullError):
        worker.submit(2, None, heard.append)
    thread = at_work(worker)
    worker.scheduler.gate.release(100)
    until(lambda: len(heard) == 3)
    assert [piece.number for piece in heard] == numbers
    assert worker.scheduler.most == 2
    end(worker, thread)


def test_who_leaves_is_not_answered(worker):
    heard = []
    numbers = [worker.submit(5, None, heard.append) for _ in range(3)]
    thread = at_work(worker)
    until(lambda: worker.num_running == 2)
    assert worker.cancel(numbers[0])
    assert worker.cancel(numbers[2])
    assert not worker.cancel(numbers[2])
    worker.scheduler.gate.release()
    until(lambda: worker.num_running == 1)
    assert worker.scheduler.left[numbers[1]] > 1
    worker.scheduler.gate.release(100)
    until(lambda: heard)
    assert [piece.number for piece in heard] == [numbers[1]]
    assert not worker.cancel(numbers[1])
    end(worker, thread)


def submitted(worker, samples):
    """What each sample is answered with, by its index in `samples`."""
    heard = [[] for _ in samples]
    for sample, pieces in zip(samples, heard, strict=True):
        worker.submit(sample, None, pieces.append)
    return heard


def outcomes(heard):
    until(lambda: all(pieces for pieces in heard))
    assert [len(pieces) for pieces in heard] == [1] * len(heard)
    return [pieces[0].error or "answered" for pieces in heard]


def test_a_prompt_that_cannot_start_fails_alone(worker):
    worker.max_batch = 3
    worker.scheduler.gate.release(100)
    heard = submitted(worker, [2, "start", 3])
    thread = at_work(worker)
    reason = "no memory: MemoryError: no room for this prompt"
    assert outcomes(heard) == ["answered", reason, "answered"]
    assert worker.scheduler.started == [[0, 1, 2], [0], [1], [2]]
    assert outcomes(submitted(worker, [1])) == ["answered"]
    assert worker.failure is None
    end(worker, thread)


def test_a_step_that_fails_costs_the_answer_that_it_fails_for(worker):
    """Each that was generated is generated alone then, and the third, which waited, after them."""
    worker.scheduler.gate.release(100)
    heard = submitted(worker, [5, "step", 2])
    thread = at_work(worker)
    reason = "RuntimeError: a model that fails"
    assert outcomes(heard) == ["answered", reason, "answered"]
    assert worker.scheduler.started == [[0, 1], [0], [1], [2]]
    assert worker.failure is None
    end(worker, thread)


@pytest.mark.parametrize(("repeats", "outcome"), [(True, "answered"), (False, "differed")])
def test_what_was_sent_is_not_sent_again(worker, repeats, outcome):
    """An answer that is begun again must repeat it."""

    def step():
        left = worker.scheduler.left
        position = 5 - left[0] if 0 in left else 0
        if 1 in left and position == 3:
            raise RuntimeError("a model that fails")
        is_again = len(worker.scheduler.started) > 1
        token = position if repeats or not is_again else 7
        left.update({0: left[0] - 1} if 0 in left else {})
        pieces = [Piece(0, f"{token} ", output=TokenOutput(0, token))] if 0 in left else []
        if left.get(0) == 0:
            del left[0]
            pieces = [Piece(0, "4 ", Answer("", [], "stop"), TokenOutput(0, 4))]
        return pieces

    worker.scheduler.step = step
    heard = []
    worker.submit(5, None, heard.append)
    other = worker.submit("other", None, heard.append)
    thread = at_work(worker)
    until(lambda: any(piece.answer or piece.error for piece in heard))
    assert [piece.text for piece in heard][:3] == ["0 ", "1 ", "2 "]
    if outcome == "answered":
        assert "".join(piece.text for piece in heard) == "0 1 2 3 4 "
    else:
        assert (len(heard), outcome in heard[3].error) == (4, True)
    worker.cancel(other)
    until(lambda: not worker.num_running)
    end(worker, thread)


def test_a_suspect_whose_client_leaves_is_not_tried(worker):
    heard = submitted(worker, [5, "step"])
    worker.scheduler.is_broken = False
    abort = worker.scheduler.abort

    def abort_and_leave(numbers=None):
        abort(numbers)
        worker.cancel(0)

    worker.scheduler.abort = abort_and_leave
    worker.scheduler.gate.release(100)
    thread = at_work(worker)
    assert outcomes(heard[1:]) == ["RuntimeError: a model that fails"]
    assert worker.scheduler.started == [[0, 1], [1]]
    assert not heard[0]
    end(worker, thread)


def test_a_callback_that_fails_costs_its_own_answer(worker):
    worker.scheduler.gate.release(100)
    heard = []

    def refuse(piece):
        heard.append(piece)
        raise ValueError("no")

    worker.submit(1, None, refuse)
    (other,) = submitted(worker, [3])
    thread = at_work(worker)
    assert outcomes([other]) == ["answered"]
    assert [piece.error for piece in heard] == [None, "ValueError: no"]
    end(worker, thread)


def test_a_model_that_stays_broken_takes_no_more_requests(worker):
    worker.scheduler.gate.release(100)
    worker.scheduler.is_broken = True
    heard = submitted(worker, [5, "step", 2])
    thread = at_work(worker)
    reason = "RuntimeError: a model that fails; then RuntimeError: a model that is broken"
    assert outcomes(heard) == [reason] * 3
    assert worker.failure == reason
    with pytest.raises(WorkerFailedError, match="a model that is broken"):
        worker.submit(1, None, None)
    end(worker, thread)


def test_a_loop_that_ends_answers_what_is_open(worker, monkeypatch):
    heard = submitted(worker, [2])

    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(worker.scheduler, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        worker.run()
    assert outcomes(heard) == [worker.failure]
    assert worker.failure.startswith("the worker ended: KeyboardInterrupt")

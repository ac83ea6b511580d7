"""The server's worker: what waits, what is cancelled, and what happens when the model fails."""

import threading

import pytest

from examples.mimo.generation.scheduler import Answer, Piece
from examples.mimo.serving.worker import QueueFullError, Worker
from tests.helpers.served import until


class Counting:
    """Answers that take so many steps as their sample says; one of 13 fails."""

    def __init__(self):
        self.left, self.most, self.gate = {}, 0, threading.Semaphore(0)

    def scheduler(self):
        return self

    def __len__(self):
        return len(self.left)

    def start(self, requests):
        self.left |= {number: sample for number, sample, _ in requests}
        self.most = max(self.most, len(self.left))
        return []

    def cancel(self, number):
        self.left.pop(number, None)

    def step(self):
        self.gate.acquire()
        if 13 in self.left.values():
            raise RuntimeError("a model that fails")
        self.left = {number: left - 1 for number, left in self.left.items()}
        done = [number for number, left in self.left.items() if not left]
        self.left = {number: left for number, left in self.left.items() if left}
        return [Piece(number, "", Answer(str(number), [], "stop")) for number in done]


@pytest.fixture
def worker(build_model):
    return Worker(Counting(), max_batch=2, max_waiting=3)


def at_work(worker):
    thread = threading.Thread(target=worker.run)
    thread.start()
    return thread


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


def test_a_model_that_fails_ends_the_loop(worker):
    worker.submit(13, None, lambda piece: None)
    worker.scheduler.gate.release()
    with pytest.raises(RuntimeError, match="a model that fails"):
        worker.run()

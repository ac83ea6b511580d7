"""What the server counts, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from examples.mimo.serving.worker import Worker

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """The counters of one server."""

    def __init__(self, worker: Worker) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "mimo_requests", "Requests by their HTTP status.", ["status"], registry=self.registry
        )
        self.prompt_tokens = Counter(
            "mimo_prompt_tokens", "Tokens of prompts.", registry=self.registry
        )
        self.answer_tokens = Counter(
            "mimo_answer_tokens", "Tokens of answers.", registry=self.registry
        )
        self.left = Counter(
            "mimo_left", "Answers whose client left before their end.", registry=self.registry
        )
        self.first_token = Histogram(
            "mimo_first_token_seconds",
            "From a request to its first token.",
            buckets=SECONDS,
            registry=self.registry,
        )
        self.whole = Histogram(
            "mimo_answer_seconds",
            "From a request to the end of its answer.",
            buckets=SECONDS,
            registry=self.registry,
        )
        running = Gauge("mimo_running", "Answers that are worked on.", registry=self.registry)
        running.set_function(lambda: worker.num_running)
        waiting = Gauge("mimo_waiting", "Answers that wait for a place.", registry=self.registry)
        waiting.set_function(lambda: worker.num_waiting)

    def page(self) -> bytes:
        """The text that Prometheus reads."""
        return generate_latest(self.registry)

"""What Prometheus reads at /metrics."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

from nirvana_deploy.serve.batch import Batch

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """The measurements of one server, in a registry of their own."""

    def __init__(self, batch: Batch) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        prefix = "nirvana_deploy"
        self.requests = Counter(
            f"{prefix}_requests", "Requests by route and status.", ["route", "status"], registry=self.registry
        )
        self.prompt_tokens = Counter(
            f"{prefix}_prompt_tokens", "Tokens of prompts that were accepted.", registry=self.registry
        )
        self.new_tokens = Counter(f"{prefix}_new_tokens", "Tokens written.", registry=self.registry)
        self.first_token = Histogram(
            f"{prefix}_first_token_seconds",
            "Time from a request to its first token, waiting included.",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.answer = Histogram(
            f"{prefix}_answer_seconds",
            "Time from a request to the end of its answer.",
            buckets=_SECONDS,
            registry=self.registry,
        )
        active = Gauge(f"{prefix}_active", "Answers that are being written.", registry=self.registry)
        active.set_function(lambda: batch.active)
        waiting = Gauge(f"{prefix}_waiting", "Requests that wait for a slot.", registry=self.registry)
        waiting.set_function(lambda: batch.waiting)
        slots = Gauge(f"{prefix}_slots", "Answers that can be written at a time.", registry=self.registry)
        slots.set(batch.slots)

    def answers_so_far(self) -> tuple[int, float]:
        """How many answers ended, and their seconds together."""
        found = {
            sample.name.rpartition("_")[2]: sample.value
            for metric in self.answer.collect()
            for sample in metric.samples
        }
        return int(found["count"]), found["sum"]

"""The metrics of /metrics, with Prometheus' names and units."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """The metrics of one server."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.queued = Gauge(
            "dllm_queue_requests",
            "answers that wait for a slot",
            registry=registry,
            multiprocess_mode="livesum",
        )
        self.slots = Gauge("dllm_slots", "slots of the cache", registry=registry, multiprocess_mode="livesum")
        self.busy = Gauge(
            "dllm_slots_busy", "slots that hold an answer", registry=registry, multiprocess_mode="livesum"
        )
        self.forwards = Counter(
            "dllm_forwards", "forwards (NFE) of answers, by kind", ["kind"], registry=registry
        )
        self.committed = Counter("dllm_committed_tokens", "tokens unmasked", registry=registry)
        self.tokens_per_forward = Histogram(
            "dllm_tokens_per_forward",
            "useful tokens over forwards (TPF) of an answer",
            registry=registry,
            buckets=(0.5, 1, 1.5, 2, 2.5, 3, 4, 6, 8, 16),
        )
        self.first_block = Histogram(
            "dllm_time_to_first_block_seconds", "from arrival", registry=registry, buckets=_SECONDS
        )
        self.between_blocks = Histogram(
            "dllm_inter_block_seconds", "between blocks of an answer", registry=registry, buckets=_SECONDS
        )
        self.requests = Counter("dllm_answers", "answers by how they ended", ["end"], registry=registry)
        self.cancelled = Counter("dllm_cancelled", "answers cancelled by their client", registry=registry)
        self.errors = Counter(
            "dllm_http_errors", "HTTP answers of 400 and above, by status", ["status"], registry=registry
        )

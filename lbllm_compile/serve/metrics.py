"""What ``/metrics`` tells, in Prometheus' format."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from lbllm_compile.serve.engine import Engine

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
STEP_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)


class Metrics:
    """Counts what an engine and its front do. Implements :class:`~.engine.Listener`."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self._prompt = Counter("lbllm_prompt_tokens", "Tokens of prompts that were read", registry=registry)
        self._cached = Counter("lbllm_cached_tokens", "Tokens of prompts known from others", registry=registry)
        self._generated = Counter("lbllm_generated_tokens", "Tokens of answers", registry=registry)
        self._requests = Counter("lbllm_requests", "Requests, by how they ended", ["ended"], registry=registry)
        self._refused = Counter("lbllm_refused", "Requests that were refused", ["status"], registry=registry)
        self._together = Histogram(
            "lbllm_step_sequences",
            "Sequences that were decoded together",
            buckets=(1, 2, 4, 8, 16, 32, 64),
            registry=registry,
        )
        self._steps = Histogram("lbllm_step_seconds", "Time of a step", buckets=STEP_SECONDS, registry=registry)
        self._first = Histogram("lbllm_first_token_seconds", "To the first token", buckets=SECONDS, registry=registry)
        self._whole = Histogram("lbllm_request_seconds", "To the end", buckets=SECONDS, registry=registry)

    def watch(self, engine: Engine) -> None:
        """Adds how many requests wait and are in work."""
        for name, text, value in (
            ("lbllm_waiting", "Requests that wait", lambda: engine.waiting),
            ("lbllm_running", "Requests in work", lambda: engine.running),
        ):
            Gauge(name, text, registry=self.registry).set_function(value)

    def step(self, sequences: int, seconds: float) -> None:
        self._together.observe(sequences)
        self._steps.observe(seconds)

    def read(self, tokens: int, cached: int) -> None:
        self._prompt.inc(tokens)
        self._cached.inc(cached)

    def ended(self, reason: str, tokens: int, first: float | None, seconds: float) -> None:
        self._requests.labels(reason).inc()
        self._generated.inc(tokens)
        self._whole.observe(seconds)
        if first is not None:
            self._first.observe(first)

    def refused(self, status: int) -> None:
        """A request was answered with an error before it reached the engine."""
        self._refused.labels(str(status)).inc()

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self.registry)

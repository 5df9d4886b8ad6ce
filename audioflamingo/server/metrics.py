"""What Prometheus sees at `/metrics`. One registry for each server, so that two in a process do not meet."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from audioflamingo.engine.engine import Engine
from audioflamingo.server.gate import Gate

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
RATES = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)


class Metrics:
    """The counters of one server.

    Args:
        engine: whose numbers are shown.
        gate: whose numbers are shown.
    """

    def __init__(self, engine: Engine, gate: Gate) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "af3_requests", "Requests by path and status.", ["path", "status"], registry=registry
        )
        self.duration = Histogram(
            "af3_request_seconds",
            "From arrival to the end of the reply.",
            ["path"],
            buckets=SECONDS,
            registry=registry,
        )
        self.first_token = Histogram(
            "af3_time_to_first_token_seconds",
            "From arrival to the first token.",
            buckets=SECONDS,
            registry=registry,
        )
        self.token_rate = Histogram(
            "af3_tokens_per_second",
            "Tokens of an answer by the seconds between its first and its last.",
            buckets=RATES,
            registry=registry,
        )
        self.audio_seconds = Counter(
            "af3_audio_seconds", "Seconds of audio that were decoded.", registry=registry
        )
        registry.register(EngineCollector(engine, gate))

    def render(self) -> bytes:
        """The text that Prometheus reads."""
        return generate_latest(self._registry)


class EngineCollector(Collector):
    """Reads numbers that are kept elsewhere, when they are asked for."""

    def __init__(self, engine: Engine, gate: Gate) -> None:
        self._engine = engine
        self._gate = gate

    def collect(self) -> Iterator[Metric]:
        """The numbers of this moment."""
        engine, gate = self._engine, self._gate
        pool, kept = engine.pool, engine.scheduler.prefixes
        num_kept, num_free = kept.num_slots, pool.num_free
        yield _gauge("af3_requests_running", "Requests at work.", gate.num_running)
        yield _gauge("af3_requests_waiting", "Requests in the queue.", gate.num_waiting)
        yield _gauge("af3_live_sessions", "Live sessions that are open.", gate.num_sessions)
        schedule = engine.scheduler
        rows = GaugeMetricFamily("af3_answers", "Answers by state.", labels=["state"])
        for state in ("waiting", "reading", "answering"):
            rows.add_metric([state], len(getattr(schedule, state)))
        yield rows
        slots = GaugeMetricFamily("af3_cache_tokens", "Slots of the cache by use.", labels=["use"])
        used = {"running": pool.num_slots - num_kept - num_free, "reusable": num_kept, "free": num_free}
        for use, count in used.items():
            slots.add_metric([use], count)
        yield slots
        yield _counter("af3_steps", "Steps of the model.", engine.num_steps)
        yield _counter("af3_prompt_tokens", "Tokens of prompts that were computed.", engine.num_prompt_tokens)
        yield _counter(
            "af3_reused_tokens", "Tokens of prompts found in the cache.", engine.scheduler.num_reused_tokens
        )
        yield _counter("af3_generated_tokens", "Tokens of answers.", engine.num_new_tokens)
        windows = CounterMetricFamily(
            "af3_audio_windows", "Windows of audio by how they came.", labels=["source"]
        )
        windows.add_metric(["encoded"], engine.clip_cache.num_misses)
        windows.add_metric(["reused"], engine.clip_cache.num_hits)
        yield windows


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, text, value=value)


def _counter(name: str, text: str, value: float) -> CounterMetricFamily:
    return CounterMetricFamily(name, text, value=value)

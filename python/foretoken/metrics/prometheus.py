"""What a session counts, for Prometheus."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from foretoken.metrics.counters import Metrics, seconds_of

PREFIX = "foretoken:"


@dataclass(frozen=True, slots=True)
class Family:
    """One metric: its samples are labels and values."""

    name: str
    kind: str
    """``"counter"`` or ``"gauge"``."""
    help: str
    samples: list[tuple[dict[str, str], float]]


_SUMS = {
    "rounds": "Verdicts of one request each.",
    "drafts": "Rounds that checked at least one draft.",
    "draft_tokens": "Drafts checked.",
    "accepted_tokens": "Drafts accepted and emitted.",
    "emitted_tokens": "Accepted and closing tokens.",
    "rollbacks": "Rounds that dropped at least one draft.",
    "moved_rows": "Accepted nodes of trees whose cache rows had to move.",
}


def families(metrics: Metrics) -> Iterator[Family]:
    """Everything a session counts, by published name; a name of a counter is without its ``_total``."""
    counters = metrics.counters

    def family(name: str, text: str, samples: list[tuple[dict[str, str], float]], kind: str) -> Family:
        return Family(PREFIX + name, kind, text, samples)

    for name, text in _SUMS.items():
        yield family(f"spec_decode_num_{name}", text, [({}, getattr(counters, name))], "counter")
    yield family("spec_decode_num_steps", "Decode forwards.", [({}, metrics.steps)], "counter")
    labelled: tuple[tuple[str, str, str, Mapping[str, float]], ...] = (
        (
            "num_accepted_tokens_per_pos",
            "position",
            "Rounds that accepted the draft at this place.",
            {str(place): count for place, count in enumerate(counters.accepted_tokens_per_pos)},
        ),
        (
            "num_rounds_by_drafts",
            "drafts",
            "Rounds that checked so many drafts.",
            {str(drafts): count for drafts, count in enumerate(counters.rounds_by_drafts) if count},
        ),
        (
            "num_status",
            "flag",
            "Rounds with this flag in their status.",
            {"bad_draft": counters.bad_draft_rounds, "law_lost": counters.law_lost_rounds},
        ),
        ("seconds", "part", "Host time by part.", seconds_of(metrics.seconds)),
    )
    for name, label, text, values in labelled:
        samples = [({label: key}, value) for key, value in values.items()]
        yield family(f"spec_decode_{name}", text, samples, "counter")
    if metrics.device_seconds is not None:
        samples = [({"part": part}, value) for part, value in seconds_of(metrics.device_seconds).items()]
        yield family("spec_decode_device_seconds", "Device time by part.", samples, "counter")
    for state in ("running", "waiting"):
        count = getattr(metrics, f"requests_{state}")
        yield family(f"num_requests_{state}", f"Requests that are {state}.", [({}, count)], "gauge")


def _merged(metrics: Metrics | Mapping[str, Metrics], labels: Mapping[str, str] | None) -> dict[str, Family]:
    """Families of one session, or of several that a label ``session`` tells apart."""
    named = {None: metrics} if isinstance(metrics, Metrics) else metrics
    merged: dict[str, Family] = {}
    for session, one in named.items():
        own = {**(labels or {}), **({} if session is None else {"session": session})}
        for family in families(one):
            known = merged.setdefault(family.name, Family(family.name, family.kind, family.help, []))
            known.samples.extend(({**own, **more}, value) for more, value in family.samples)
    return merged


def prometheus(metrics: Metrics | Mapping[str, Metrics], labels: Mapping[str, str] | None = None) -> str:
    """What sessions count, in the text format that Prometheus scrapes. It reads what the host knows already.

    Parameters
    ----------
    metrics
        Of one session; or of several, by a name that becomes the label ``session``.
    labels
        To put on every sample.

    Examples
    --------
    >>> print(prometheus(session.metrics, {"model": "m"}))     # doctest: +SKIP
    # HELP foretoken:spec_decode_num_drafts_total Rounds that checked at least one draft.
    # TYPE foretoken:spec_decode_num_drafts_total counter
    foretoken:spec_decode_num_drafts_total{model="m"} 123
    """
    lines = []
    for family in _merged(metrics, labels).values():
        name = family.name + ("_total" if family.kind == "counter" else "")
        lines += [f"# HELP {name} {family.help}", f"# TYPE {name} {family.kind}"]
        for own, value in family.samples:
            inside = ",".join(f'{key}="{_escaped(text)}"' for key, text in own.items())
            lines.append(f"{name}{{{inside}}} {value}" if inside else f"{name} {value}")
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def prometheus_collector(
    metrics: Metrics | Mapping[str, Metrics], labels: Mapping[str, str] | None = None
) -> Any:
    """The same as a collector to register with ``prometheus_client``: every scrape reads the sessions anew.

    Raises
    ------
    ImportError
        ``prometheus_client`` is not installed.
    """
    core: Any = import_module("prometheus_client.core")

    class Collector:
        def collect(self) -> Iterator[Any]:
            for family in _merged(metrics, labels).values():
                kind = core.CounterMetricFamily if family.kind == "counter" else core.GaugeMetricFamily
                names = list(family.samples[0][0]) if family.samples else []
                found = kind(family.name, family.help, labels=names)
                for own, value in family.samples:
                    found.add_metric([own[name] for name in names], value)
                yield found

    return Collector()

"""What others read of the metrics: Prometheus, records, pictures, counters and times kept on a device."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch

from foretoken import cli, ops, plot
from foretoken.device.clock import DeviceClock
from foretoken.metrics import CounterReader, Seconds, prometheus, prometheus_collector
from foretoken.sampling import Sampling
from toys import Ask, bench, some_asks, table

TABLE = table(23, seed=1)
SAMPLE = re.compile(r"([a-z:_]+)(?:\{(.*)\})? (\S+)")


def made(kind: str = "model", **options: Any) -> Any:
    one = bench(TABLE, kind, max_batch=3, **options)
    one.requests = [
        ask.admit(one.session) for ask in some_asks(9, seed=2, vocab=23, sampling=Sampling(seed=1))
    ]
    one.run([Ask([1, 2, 3], 12)])
    return one


def samples_of(text: str) -> dict[tuple[str, str], float]:
    """Samples by name and labels; every family is told once, before its samples."""
    found, told = {}, []
    for line in text.splitlines():
        if line.startswith("# TYPE"):
            _, _, name, kind = line.split()
            assert name not in told
            assert (kind == "counter") == name.endswith("_total")
            told.append(name)
        elif not line.startswith("# HELP"):
            name, labels, value = SAMPLE.fullmatch(line).groups()
            assert name == told[-1]
            assert (name, labels) not in found
            found[name, labels] = float(value)
    assert text.endswith("\n")
    return found


def test_prometheus_tells_every_counter():
    session = made().session
    counters = session.metrics.counters
    found = samples_of(prometheus(session.metrics))

    def value(name: str, labels: str | None = None) -> float:
        return found[f"foretoken:spec_decode_{name}_total", labels]

    for name in ("rounds", "drafts", "draft_tokens", "accepted_tokens", "emitted_tokens", "rollbacks"):
        assert value(f"num_{name}") == getattr(counters, name) > 0
    for place, count in enumerate(counters.accepted_tokens_per_pos):
        assert value("num_accepted_tokens_per_pos", f'position="{place}"') == count
    for drafts, count in enumerate(counters.rounds_by_drafts):
        assert count == 0 or value("num_rounds_by_drafts", f'drafts="{drafts}"') == count
    assert value("num_status", 'flag="law_lost"') == counters.law_lost_rounds
    assert value("num_steps") == session.metrics.steps
    assert value("seconds", 'part="draft"') == session.metrics.seconds.draft
    assert found["foretoken:num_requests_running", None] == 0
    session.admit([1], max_new_tokens=2)
    assert "foretoken:num_requests_waiting 1\n" in prometheus(session.metrics)


def test_labels_are_put_on_every_sample_and_escaped():
    one, other = made().session, made("ngram").session
    both = {"a": one.metrics, 'b"\\\n': other.metrics}
    found = samples_of(prometheus(both, {"model": "m"}))
    name = "foretoken:spec_decode_num_rounds_total"
    assert found[name, 'model="m",session="a"'] == one.metrics.counters.rounds
    assert found[name, 'model="m",session="b\\"\\\\\\n"'] == other.metrics.counters.rounds
    assert all(labels.startswith('model="m",session="') for _, labels in found)


def test_the_collector_tells_prometheus_client_the_same():
    exposition = pytest.importorskip("prometheus_client.exposition")
    from prometheus_client import CollectorRegistry

    session = made().session
    registry = CollectorRegistry()
    registry.register(prometheus_collector(session.metrics, {"model": "m"}))

    def sorted_labels(text: str) -> dict[tuple[str, tuple[str, ...]], float]:
        found = samples_of(text).items()
        return {(name, tuple(sorted(labels.split(",")))): value for (name, labels), value in found}

    theirs = sorted_labels(exposition.generate_latest(registry).decode())
    assert theirs == sorted_labels(prometheus(session.metrics, {"model": "m"}))


def test_without_prometheus_client_there_is_no_collector(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "prometheus_client.core", None)
    with pytest.raises(ImportError, match="prometheus_client"):
        prometheus_collector(made().session.metrics)


def test_records_are_json_and_add_up():
    one = made()
    record = json.loads(json.dumps(one.session.metrics.record(one.requests)))
    counters = one.session.metrics.counters
    assert record["accepted_tokens"] == counters.accepted_tokens
    assert record["acceptance_by_position"] == list(counters.acceptance_rate_per_pos)
    assert record["seconds"]["draft"] > 0
    assert "device_seconds" not in record
    first, request = record["requests"][0], one.requests[0]
    assert first["generated_tokens"] == first["emitted_tokens"] == request.num_generated
    assert (first["id"], first["finish_reason"], first["status"]) == (request.id, "length", [])
    # One more request was run than is told of.
    assert sum(part["emitted_tokens"] for part in record["requests"]) == counters.emitted_tokens - 12


# ---- foretoken plot ----


def test_plot_draws_sessions_requests_and_demos(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    one = made()
    session, demo = tmp_path / "night.json", tmp_path / "demo.json"
    session.write_text(json.dumps(one.session.metrics.record(one.requests)))
    row = {"method": "m", "drafts": 4, "temperature": 0.8, "tokens_per_round": 3.5}
    demo.write_text(json.dumps({"rows": [{**row, "acceptance_by_position": [0.9, 0.5]},
                                         {**row, "acceptance_by_position": []}]}))  # fmt: skip
    picture = tmp_path / "out.svg"
    assert cli.main(["plot", str(session), str(demo), "--requests", "-o", str(picture)]) == 0
    assert capsys.readouterr().err == ""
    assert picture.stat().st_size > 5000
    assert [part.label for part in plot.read(str(demo))] == ["m, K=4, T=0.8"]
    whole = plot.read(str(session))
    assert [part.label for part in whole] == ["night"]
    assert whole[0].by_position == one.session.metrics.counters.acceptance_rate_per_pos
    assert whole[0].tokens_per_round == one.session.metrics.counters.tokens_per_round
    assert len(plot.read(str(session), requests=True)) == len(one.requests)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "JSONDecodeError"), ("[1]", "TypeError"), ("{}", "KeyError: 'acceptance_by_position'")],
)
def test_plot_refuses_what_is_no_record(tmp_path, capsys, text: str, message: str):
    file = tmp_path / "a.json"
    file.write_text(text)
    assert cli.main(["plot", str(file), "-o", str(tmp_path / "a.png")]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"foretoken plot: {file}: expected a session's record or a report of")
    assert message in told
    assert cli.main(["plot", str(tmp_path / "none.json"), "-o", "a.png"]) == 2


# ---- kept on a device ----


def test_a_reader_gives_the_sums_of_all_slots():
    counters = ops.RoundCounters.empty(3, 2, 5)
    reader = CounterReader(counters)
    counters.sums[:] = torch.arange(30).view(3, 10)
    counters.accepted_per_pos[1] = torch.tensor([4, 2])
    counters.rounds_by_drafts[:, 5] = 7
    found = reader.read()
    assert (found.rounds, found.drafts, found.law_lost_rounds) == (30, 33, 54)
    assert found.accepted_tokens_per_pos == (4, 2)
    assert found.rounds_by_drafts == (0, 0, 0, 0, 0, 21)


class Tick:
    """An event that passes when it is told to."""

    passed = 0.0
    number = 0.0

    def record(self) -> None:
        Tick.number += 1.0
        self.at = Tick.number

    def query(self) -> bool:
        return self.at <= Tick.passed

    def elapsed_time(self, other: Tick) -> float:
        assert other.query()
        return 1e3 * (other.at - self.at)


def test_device_time_goes_to_its_parts_once_it_has_passed():
    clock, seconds = DeviceClock(Tick), Seconds()
    for part in ("rest", "draft", "target_forward", "verify_commit", "rest", "draft"):
        clock.mark(part)
    Tick.passed = 3.0
    clock.read(seconds)
    assert (seconds.draft, seconds.target_forward, seconds.verify_commit) == (1.0, 1.0, 0.0)
    clock.stop()
    clock.mark("rest")
    Tick.passed = 99.0
    clock.read(seconds)
    # From the stop to the next mark nothing is counted but the rest that begins there.
    assert seconds == Seconds(2.0, 1.0, 0.0, 1.0, 2.0)


def test_sessions_on_the_cpu_have_no_device_time():
    with pytest.raises(ValueError, match="measure_device: expected a session on a CUDA device"):
        made().session.metrics.measure_device()

"""Records of calls: log lines, the file, figures, and the Prometheus endpoint."""

from __future__ import annotations

import json
import logging
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from coterie.config import RunConfig
from coterie.errors import ConfigError, RunFolderError
from coterie.inference.calls import CallLines, CallRecord, EachOf, log_line, one_line
from coterie.inference.ladder import TierStatus
from coterie.monitor.calls import CALL_METRICS, CallLog, CallStatistics, read_calls
from coterie.monitor.prometheus import PrometheusEndpoint
from coterie.runs.directory import RunDirectory
from coterie.types import AdapterVersion, Tier


def record(**fields: Any) -> CallRecord:
    values: dict[str, Any] = {
        "tier": Tier.HTTP, "server": "h:1", "model": "a", "adapter": AdapterVersion("a", 2), "prompt_tokens": 10,
        "completion_tokens": 3, "latency_s": 0.5, "queued_s": 0.1, "outcome": "ok", "text": "答案",
    }  # fmt: skip
    return CallRecord(**{**values, **fields})


# -- lines --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tier", "label"),
    [
        (Tier.CAMEL, "🤖 Camel VLLM生成: 答案"),
        (Tier.HTTP, "🤖 HTTP VLLM生成: 答案"),
        (Tier.LOCAL, "🤖 本地引擎生成: 答案"),
        (Tier.SIMULATED, "🤖 模拟VLLM生成: 答案"),
    ],
)
def test_every_tier_has_its_line(tier: Tier, label: str) -> None:
    assert log_line(record(tier=tier)) == label


def test_a_line_is_one_short_line_without_control_characters() -> None:
    text = "one\ntwo\r\n\tthree \x1b[31mred\x1b[0m \u202eevil\u2028end " + "x" * 500
    line = log_line(record(text=text))
    shown = line.removeprefix("🤖 HTTP VLLM生成: ")
    assert shown.startswith("one two three [31mred[0m evil end xxx")
    assert len(shown) == 60
    assert shown.endswith("…")
    assert one_line("短", 60) == "短"
    assert len(one_line("\x00" * 300 + "a" * 100, 60)) <= 60


def test_failures_name_server_and_kind_and_are_louder_when_they_are_for_good(caplog: pytest.LogCaptureFixture) -> None:
    lines = CallLines()
    with caplog.at_level(logging.INFO, logger="coterie.calls"):
        lines.call(record())
        lines.call(record(outcome="fallback", fault="timeout", text=""))
        lines.call(record(outcome="fault", fault="rejected", text=""))
        lines.call(record(outcome="cancelled", fault="cancelled", server="", text=""))
    assert [(r.levelname, r.message) for r in caplog.records] == [
        ("INFO", "🤖 HTTP VLLM生成: 答案"),
        ("INFO", "⚠️ HTTP VLLM生成 h:1 fallback: timeout -> 换用下一个"),
        ("WARNING", "⚠️ HTTP VLLM生成 h:1 fault: rejected"),
        ("INFO", "⚠️ HTTP VLLM生成 cancelled: cancelled"),
    ]


def test_several_sinks_are_told_in_order() -> None:
    one, two = CallStatistics(), CallStatistics()
    EachOf(one, two).call(record())
    assert one.metrics() == two.metrics() != {}


# -- the file -----------------------------------------------------------------------------------------------------


def test_records_become_lines_without_their_text(tmp_path: Path) -> None:
    log = CallLog(tmp_path / "calls.jsonl", clock=lambda: 12.3456)
    log.call(record())
    log.call(record(outcome="fault", fault="timeout", adapter=None))
    assert log.path.read_bytes() == b""  # not yet: lines are written together
    log.flush()
    first, second = read_calls(log.path)
    assert first == {
        "time": 12.346, "tier": "http", "server": "h:1", "model": "a", "adapter": "a@v2", "prompt_tokens": 10,
        "completion_tokens": 3, "latency_s": 0.5, "queued_s": 0.1, "outcome": "ok", "fault": "",
    }  # fmt: skip
    assert (second["outcome"], second["fault"], second["adapter"]) == ("fault", "timeout", None)
    assert "答" not in log.path.read_text(encoding="utf-8")
    log.call(record())
    log.close()
    log.call(record())  # too late
    assert len(list(read_calls(log.path))) == 3


def test_the_file_is_bounded_and_the_latest_records_are_kept(tmp_path: Path) -> None:
    log = CallLog(tmp_path / "calls.jsonl", max_bytes=4000, buffered=1)
    for number in range(100):
        log.call(record(prompt_tokens=number))
    log.close()
    assert log.path.stat().st_size <= 4000
    assert log.previous.stat().st_size <= 4000
    assert sorted(p.name for p in tmp_path.iterdir()) == ["calls.1.jsonl", "calls.jsonl"]
    kept = [entry["prompt_tokens"] for entry in read_calls(log.path)]
    assert kept == list(range(100 - len(kept), 100))
    assert len(kept) > 15


def test_a_line_torn_by_a_dying_process_is_dropped_and_the_rest_kept(tmp_path: Path) -> None:
    path = tmp_path / "calls.jsonl"
    for whole in (0, 3, 400):  # 400 lines are more than is read to find the last end of line
        path.write_bytes(b'{"tier": "http", "pad": "%s"}\n' % (b"x" * 300) * whole + b'{"tier": "ht')
        log = CallLog(path)
        log.call(record())
        log.close()
        entries = list(read_calls(path))
        assert len(entries) == whole + 1
        assert entries[-1]["server"] == "h:1"


def test_a_file_that_cannot_be_written_or_read_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(RunFolderError, match="cannot write"):
        CallLog(tmp_path / "nowhere" / "calls.jsonl")
    (tmp_path / "calls.jsonl").write_text("{}\nnonsense\n{}\n", encoding="utf-8")
    with pytest.raises(RunFolderError, match="line 2"):
        list(read_calls(tmp_path / "calls.jsonl"))
    full = CallLog(tmp_path / "full.jsonl", max_bytes=10, buffered=1)
    full.previous.mkdir()  # stands where the older part should go
    for _ in range(3):
        full.call(record())  # goes on, and says once that nothing is recorded any more
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    full.close()


# -- figures ------------------------------------------------------------------------------------------------------


def test_figures_by_tier_and_server() -> None:
    statistics = CallStatistics()
    for number in range(100):
        statistics.call(record(latency_s=number / 100, server=f"h:{number % 2}", text="合作与竞争"))
    for _ in range(25):
        statistics.call(record(outcome="fault", fault="timeout"))
        statistics.call(record(outcome="fallback", fault="timeout"))
    statistics.call(record(outcome="cancelled"))
    statistics.call(record(tier=Tier.SIMULATED, server="", text="nothing"))
    found = statistics.metrics()
    assert found["calls/http/answered"] == 100
    assert found["calls/http/failed"] == found["calls/http/fallbacks"] == 25
    assert found["calls/http/cancelled"] == 1
    assert found["calls/http/success_rate"] == pytest.approx(0.8)
    assert found["calls/http/latency_p50"] == pytest.approx(0.5, abs=0.02)
    assert found["calls/http/latency_p90"] == pytest.approx(0.9, abs=0.02)
    assert found["calls/http/latency_p99"] == pytest.approx(0.99, abs=0.02)
    assert found["calls/http/queued_mean"] == pytest.approx(0.1)
    assert found["calls/http/tokens"] == 300
    assert found["calls/http/response_quality"] == pytest.approx(0.15)
    assert found["calls/simulated/response_quality"] == pytest.approx(0.05)
    assert found["calls/simulated_share"] == pytest.approx(1 / 101)
    assert {name.replace("/http/", "/<tier>/").replace("/simulated/", "/<tier>/") for name in found} == set(
        CALL_METRICS
    )
    table = statistics.table()
    assert [row[0] for row in table.rows] == ["http", "  h:0", "  h:1", "simulated"]


def test_what_was_not_measured_is_not_told() -> None:
    statistics = CallStatistics()
    assert statistics.metrics() == {}
    statistics.call(record(outcome="fallback"))
    assert "calls/http/success_rate" not in statistics.metrics()
    assert "calls/http/latency_p50" not in statistics.metrics()
    statistics.call(record(latency_s=2.0))
    assert statistics.metrics()["calls/http/latency_p99"] == 2.0


# -- the endpoint -------------------------------------------------------------------------------------------------


def scrape(url: str) -> dict[str, float]:
    with urllib.request.urlopen(url, timeout=5) as response:
        lines = response.read().decode().splitlines()
    return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines if not line.startswith("#")}


def test_prometheus_reads_the_same_calls() -> None:
    endpoint = PrometheusEndpoint()
    assert endpoint.url == ""
    url = endpoint.start()
    try:
        assert url.startswith("http://127.0.0.1:")
        assert endpoint.start() == url
        for _ in range(3):
            endpoint.call(record())
        endpoint.call(record(outcome="fault", fault="timeout"))
        endpoint.tiers((TierStatus(Tier.HTTP, True, True, "", 0.0), TierStatus(Tier.LOCAL, False, False, "x", 1.0)))
        found = scrape(url)
        with pytest.raises(ConfigError, match="cannot serve metrics"):
            PrometheusEndpoint().start(port=int(url.split(":")[2].split("/")[0]))
    finally:
        endpoint.stop()
    assert found['coterie_calls_total{outcome="ok",server="h:1",tier="http"}'] == 3
    assert found['coterie_calls_total{outcome="fault",server="h:1",tier="http"}'] == 1
    assert found['coterie_call_latency_seconds_sum{server="h:1",tier="http"}'] == pytest.approx(1.5)
    assert found['coterie_completion_tokens_total{model="a",tier="http"}'] == 9
    assert found['coterie_tier_up{tier="http"}'] == 1
    assert found['coterie_tier_up{tier="local"}'] == 0
    endpoint.stop()
    again = PrometheusEndpoint()  # a registry of its own: two endpoints in one process do not clash
    again.call(replace(record(), completion_tokens=1))
    assert json.dumps(again.url) == '""'


def test_a_run_keeps_its_calls_and_a_run_in_which_nothing_happened_takes_them_back(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run", RunConfig())
    log = CallLog(run.calls_path, max_bytes=10, buffered=1)
    for _ in range(3):
        log.call(record())
    log.close()
    assert [entry["server"] for entry in read_calls(run.calls_path)] == ["h:1", "h:1"]
    run.discard_unused()
    assert list(run.path.glob("calls*")) == []

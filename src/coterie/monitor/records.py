"""Everything a run keeps of its calls, as one sink: log lines, calls.jsonl, figures, and a Prometheus endpoint."""

from __future__ import annotations

from pathlib import Path

from coterie.inference.calls import CallLines, CallRecord, CallSink, EachOf
from coterie.monitor.calls import CallLog, CallStatistics
from coterie.monitor.prometheus import PrometheusEndpoint


class CallRecords:
    """A `CallSink` for a run with servers. `close` it, or the last lines are lost."""

    def __init__(self, path: Path | None, metrics_port: int | None = None) -> None:
        """`path`: of calls.jsonl, None keeps no file. `metrics_port`: of the Prometheus endpoint, None for none.

        Raises:
            RunFolderError: calls.jsonl cannot be written.
            ConfigError: the port is taken.
        """
        self.statistics = CallStatistics()
        self._log = CallLog(path) if path is not None else None
        self._endpoint = PrometheusEndpoint() if metrics_port is not None else None
        self.url = self._endpoint.start(metrics_port) if self._endpoint is not None and metrics_port is not None else ""
        """Of the endpoint; empty where there is none."""
        sinks: list[CallSink | None] = [CallLines(), self.statistics, self._log, self._endpoint]
        self._sinks = EachOf(*(sink for sink in sinks if sink is not None))

    def call(self, record: CallRecord) -> None:
        """See `CallSink`."""
        self._sinks.call(record)

    def metrics(self) -> dict[str, float]:
        """Figures of all calls so far, by the names in `CALL_METRICS`."""
        return self.statistics.metrics()

    def close(self) -> None:
        """Write what is left and stop serving."""
        if self._log is not None:
            self._log.close()
        if self._endpoint is not None:
            self._endpoint.stop()

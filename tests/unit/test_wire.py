"""Server urls, and what a failed call says."""

from __future__ import annotations

import pytest

from coterie.errors import ConfigError
from coterie.inference.wire import FaultKind, ServerFault, server_spec


@pytest.mark.parametrize(
    "url", ["http://host:8000", "http://host:8000/", "http://host:8000/v1", "http://host:8000/v1/"]
)
def test_every_way_of_writing_a_url_is_the_same_server(url: str) -> None:
    spec = server_spec(url)
    assert (spec.url, spec.root, spec.name) == ("http://host:8000/v1", "http://host:8000", "host:8000")


def test_a_path_before_v1_is_kept() -> None:
    assert server_spec("https://host/models/a").url == "https://host/models/a/v1"


@pytest.mark.parametrize("url", ["host:8000", "ftp://host", "http://", "", "http://me:secret@host"])
def test_what_is_no_server_url_is_refused_without_its_secret(url: str) -> None:
    with pytest.raises(ConfigError, match="url") as caught:
        server_spec(url)
    assert "secret" not in str(caught.value)


def test_the_longest_matching_directory_is_mapped() -> None:
    spec = server_spec("http://h", paths={"/runs": "/mnt/a", "/runs/one": "/mnt/b"})
    assert spec.sees("/runs/one/x") == "/mnt/b/x"
    assert spec.sees("/runs/oneself") == "/mnt/a/oneself"
    assert spec.sees("/else/x") == "/else/x"


def test_keys_stay_out_of_logs() -> None:
    assert "hidden" not in repr(server_spec("http://h", api_key="hidden"))


def test_a_fault_names_server_kind_and_status() -> None:
    fault = ServerFault(FaultKind.OVERLOADED, "h:1", "queue is full", status=503, retry_after_s=2.0)
    assert str(fault) == "h:1: overloaded (503): queue is full"

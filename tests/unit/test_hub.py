"""Base models from the hub: the cache first, then the network, and a reason for every way that can fail."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

from coterie.errors import BaseModelError
from coterie.lm.embedded import resolve_base
from coterie.lm.tiny import tiny_random

RESPONSE: Any = SimpleNamespace(headers={}, request=None)


class FakeHub:
    """Stands in for `snapshot_download`: what the cache holds, and what the network would answer."""

    def __init__(self, cached: Path | None, online: Path | Exception) -> None:
        self.cached, self.online = cached, online
        self.asked: list[str] = []

    def snapshot_download(self, repo_id: str, *, local_files_only: bool, **filters: list[str]) -> str:
        assert "*.safetensors" in filters["allow_patterns"]
        assert "*.bin" not in filters["allow_patterns"]
        self.asked.append("cache" if local_files_only else "network")
        if local_files_only:
            if self.cached is None:
                raise LocalEntryNotFoundError("not in the cache")
            return str(self.cached)
        if isinstance(self.online, Exception):
            raise self.online
        return str(self.online)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return tiny_random(tmp_path / "tiny")


def use(monkeypatch: pytest.MonkeyPatch, hub: FakeHub, *, offline: bool = False) -> FakeHub:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    return hub


def test_a_whole_copy_in_the_cache_is_used_without_the_network(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = use(monkeypatch, FakeHub(tiny, AssertionError()))
    assert resolve_base("org/name") == tiny
    assert hub.asked == ["cache"]


def test_what_is_missing_or_not_whole_is_downloaded(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "half").mkdir()
    for cached in (None, tmp_path / "half"):
        hub = use(monkeypatch, FakeHub(cached, tiny))
        said: list[str] = []
        assert resolve_base("org/name", report=said.append) == tiny
        assert hub.asked == ["cache", "network"]
        assert said == ["downloading org/name from the hub"]


@pytest.mark.parametrize(
    ("offline", "allowed", "why"),
    [
        (True, True, "HF_HUB_OFFLINE is set"),
        (False, False, "downloads are off"),
        (True, False, "HF_HUB_OFFLINE is set"),
    ],
)
def test_offline_and_not_cached(
    offline: bool, allowed: bool, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for cached, state in ((None, "missing"), (tmp_path, r"unusable \(.*no config\.json")):
        hub = use(monkeypatch, FakeHub(cached, AssertionError()), offline=offline)
        with pytest.raises(BaseModelError, match=rf"(?s)'org/name'.*{state}.*{why}.*coterie models pull org/name"):
            resolve_base("org/name", allow_download=allowed)
        assert hub.asked == ["cache"]


@pytest.mark.parametrize(
    ("failure", "said"),
    [
        (RepositoryNotFoundError("404", response=RESPONSE), "neither a local directory nor a public model on the hub"),
        (GatedRepoError("403", response=RESPONSE), "terms must be accepted .* `hf auth login`"),
        (
            HfHubHTTPError("503 busy\ntrace", response=RESPONSE),
            "cannot download .*: 503 busy; run `coterie models pull",
        ),
        (LocalEntryNotFoundError("no connection"), "no connection; run `coterie models pull gpt2` with network access"),
        (TimeoutError(), "cannot download base model 'gpt2' from the hub: TimeoutError"),
    ],
)
def test_failures_of_the_hub(failure: Exception, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, FakeHub(None, failure))
    with pytest.raises(BaseModelError, match=said) as caught:
        resolve_base("gpt2", report=str)
    assert "smollm2-135m-instruct" in str(caught.value)
    assert caught.value.__cause__ is failure


def test_a_repository_without_safetensors_is_told_why(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tiny / "model.safetensors").rename(tiny / "pytorch_model.bin")
    use(monkeypatch, FakeHub(None, tiny))
    with pytest.raises(BaseModelError, match="weights are pickled"):
        resolve_base("org/old", report=str)

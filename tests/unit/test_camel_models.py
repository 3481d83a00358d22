"""`VLLMClient` over models a user made by CAMEL's factory, with a fake of CAMEL's interface.

`tests/external/test_camel.py` asks the same of every supported release of CAMEL.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Coroutine, Iterator
from types import ModuleType
from typing import Any

import pytest

from coterie.errors import ConfigError
from coterie.inference.client import VLLMClient
from coterie.inference.fake import FakeServer
from coterie.types import Tier
from tests.support.scripts import ROOT
from tests.support.servers import Records

PACKAGES = ("camel", "openai")


def run(work: Coroutine[Any, Any, Any]) -> Any:
    async def bounded() -> Any:
        async with asyncio.timeout(60):
            return await work

    return asyncio.run(bounded())


@pytest.fixture(autouse=True)
def _fake_camel(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The fake is what `import camel` finds; whatever was imported before is put back."""

    def ours() -> dict[str, ModuleType]:
        names = [n for n in sys.modules if n.partition(".")[0] in PACKAGES or n == "coterie.inference.camel"]
        return {name: sys.modules.pop(name) for name in names}

    before = ours()
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "support" / "fake_camel"))
    yield
    ours()
    sys.modules.update(before)


def user_model(url: str | None, config: dict[str, Any] | None = None) -> Any:
    from camel.models import ModelFactory
    from camel.types import ModelPlatformType

    return ModelFactory.create(ModelPlatformType.VLLM, "fake-model", config, url=url)


def test_the_camel_tier_asks_through_the_users_own_object() -> None:
    async def play() -> None:
        async with FakeServer(seed=2) as server:
            model = user_model(server.url, {"temperature": 0.1, "user": "me", "extra_body": {"priority": 3}})
            records = Records()
            async with VLLMClient(camel_models=[model], model_name="fake-model", calls=records) as client:
                assert (client.tier, client.connection_available) == (Tier.CAMEL, True)
                answer = await client.generate("Hi.", max_tokens=4, temperature=0.9, seed=5, return_tokens=True)
                sent = server.requests[-1]
                assert (answer.tier, answer.server, len(answer.token_ids or ())) == (Tier.CAMEL, server.spec.name, 4)
                assert (sent["temperature"], sent["seed"], sent["max_tokens"]) == (0.9, 5, 4)  # the call's
                assert (sent["user"], sent["priority"]) == ("me", 3)  # and the owner's
                pieces = [piece async for piece in client.stream("Hi.", max_tokens=4, temperature=0.9, seed=5)]
                assert "".join(pieces) == answer.text
            assert {call["max_retries"] for call in model._async_client.calls} == {0}  # routing is the pool's
            assert {record.tier for record in records.kept} == {Tier.CAMEL}
            assert model.model_config_dict == {"temperature": 0.1, "user": "me", "extra_body": {"priority": 3}}
            assert not model._async_client.closed  # its owner's to close

    run(play())


def test_several_models_and_urls_are_one_pool_and_one_that_dies_costs_no_answer() -> None:
    async def play() -> None:
        async with FakeServer(seed=1) as one, FakeServer(seed=1) as two, FakeServer(seed=1) as three:
            models = [user_model(one.url), user_model(two.url)]
            async with VLLMClient(three.url, "fake-model", camel_models=models, policy="round_robin") as client:
                answers = await asyncio.gather(*(client.generate(f"{n}", 3, seed=n) for n in range(12)))
                assert all(server.answered > 0 for server in (one, two, three))
                one.kill()
                again = await asyncio.gather(*(client.generate(f"{n}", 3, seed=n) for n in range(12)))
                assert again == answers
                assert client.tier is Tier.CAMEL

    run(play())


def test_without_any_of_its_servers_the_next_tier_answers() -> None:
    async def play() -> None:
        async with FakeServer(seed=1) as server:
            model = user_model(server.url)
            async with VLLMClient(camel_models=[model], tiers=("camel", "simulated"), timeout_s=5) as client:
                assert not (await client.generate("Hi.", 3)).startswith("[simulated]")
                server.kill()
                assert (await client.generate("Hi.", 3)).startswith("[simulated]")
                assert client.status()[0].why

    run(play())


def test_models_that_cannot_serve_are_refused_at_once() -> None:
    from camel.models import ModelFactory
    from camel.types import ModelPlatformType

    with pytest.raises(ConfigError, match=r"StubModel cannot be asked for token ids.*ModelPlatformType\.VLLM"):
        VLLMClient(camel_models=[ModelFactory.create(ModelPlatformType.OTHER, "any")])
    with pytest.raises(ConfigError, match="made without url"):
        VLLMClient(camel_models=[user_model(None)])

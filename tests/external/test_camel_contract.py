"""CAMEL's models as a transport keep what every transport keeps: those made here, and those a user made."""

from __future__ import annotations

from typing import Any

import pytest
from camel.models import ModelFactory
from camel.types import ModelPlatformType

from coterie.inference.camel import CamelTransport, CoterieTokenCounter
from coterie.inference.counting import ByteCounter
from coterie.inference.wire import ServerSpec, Transport, WireReply, WireRequest
from coterie.types import Tier
from tests.contract import test_transport_contract as contract
from tests.contract.test_transport_contract import *  # noqa: F403 - the tests, with the fixture below

pytestmark = pytest.mark.camel


def user_model(server: ServerSpec, config: dict[str, Any] | None = None, **more: Any) -> Any:
    """As a user makes one, with settings of their own that calls must not be sampled by."""
    headers = {"Authorization": f"Bearer {server.api_key}"} if server.api_key else {}
    return ModelFactory.create(
        model_platform=ModelPlatformType.VLLM,
        model_type="fake-model",
        model_config_dict={"temperature": 0.1, "top_p": 0.2, "max_tokens": 3} if config is None else config,
        token_counter=CoterieTokenCounter(ByteCounter()),
        url=server.url,
        default_headers=headers,
        **more,
    )


class Given(Transport):
    """`CamelTransport` over a user's model for each server and key it is called with."""

    tier = Tier.CAMEL

    def __init__(self) -> None:
        self._transports: dict[ServerSpec, CamelTransport] = {}
        self._models: list[Any] = []

    async def call(self, server: ServerSpec, request: WireRequest, timeout_s: float) -> WireReply:
        return await self._for(server).call(server, request, timeout_s)

    def _for(self, server: ServerSpec) -> CamelTransport:
        if server not in self._transports:
            self._models.append(user_model(server))
            self._transports[server] = CamelTransport(self._models[-1:])
        return self._transports[server]

    async def close(self) -> None:
        for transport in self._transports.values():
            await transport.close()
        for model in self._models:  # their owner closes them
            model._client.close()
            await model._async_client.close()
        self._transports, self._models = {}, []


CAMEL = [
    pytest.param(contract.Subject(CamelTransport, Tier.CAMEL, prompt_ids=False), id="made"),
    pytest.param(contract.Subject(Given, Tier.CAMEL, prompt_ids=False), id="given"),
]


@pytest.fixture(params=CAMEL)
def subject(request: pytest.FixtureRequest) -> contract.Subject:
    found: contract.Subject = request.param
    return found

"""RemoteEngine on servers in memory: what is asked, what is made of the answers, and what is refused."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from coterie.errors import EngineError
from coterie.inference.fake import distribution
from coterie.inference.remote import RemoteEngine
from coterie.inference.sampling import uniform
from coterie.inference.trust import TierFailedError, UnfitServerError
from coterie.inference.wire import FaultKind, ServerFault, WireReply
from coterie.types import AdapterVersion, GenerateRequest, Generation, Tier
from tests.support.servers import BASE, MemoryServers, Records, fault, without

PROMPT = (10, 20, 30, 40)
CHOICES = ((50,), (60, 61), (60, 62, 63), (60, 62, 64), (70, 71))
TRAINED = AdapterVersion("a", 3)


def ask(**fields: Any) -> GenerateRequest:
    return GenerateRequest(**{"prompt_ids": PROMPT, "adapter": None, "seed": 1, **fields})


def go(work: Coroutine[Any, Any, Any]) -> Any:
    async def bounded() -> Any:
        return await asyncio.wait_for(work, 20)

    return asyncio.run(bounded())


def made(engine: RemoteEngine, *requests: GenerateRequest) -> list[Generation]:
    async def all_at_once() -> list[Generation]:
        return list(await asyncio.gather(*map(engine.generate, requests)))

    found: list[Generation] = go(all_at_once())
    return found


# -- what is asked ------------------------------------------------------------------------------------------------


def test_free_text_is_one_call_with_the_prompt_as_ids() -> None:
    servers = MemoryServers()
    (turn,) = made(servers.engine(), ask(max_tokens=5, temperature=0.7, seed=2**40 + 3, stop_ids=(2,), bias={9: 1.5}))
    ((name, sent),) = servers.generations
    assert (name, sent.model, sent.prompt_ids, sent.messages) == ("one", BASE, PROMPT, ())
    assert (sent.max_tokens, sent.temperature, sent.stop_ids) == (5, 0.7, (2,))
    assert (sent.allowed, sent.bias, sent.top, sent.capture) == (None, {9: 1.5}, 0, True)
    assert sent.seed == 3
    assert (turn.tier, turn.server, turn.prompt_ids, turn.allowed) == (Tier.HTTP, "one", PROMPT, None)
    expected = []
    for i, token in enumerate(turn.token_ids):
        context = PROMPT + turn.token_ids[:i]
        expected.append(distribution(servers.policy(BASE), context, bias={9: 1.5}, temperature=0.7)[token])
    assert turn.logprobs == pytest.approx(expected)
    assert turn.entropy == tuple(-p for p in turn.logprobs)
    assert turn.latency_s > 0


def test_the_stop_token_is_kept_and_ends_the_turn() -> None:
    everything = tuple(range(259))
    (turn,) = made(MemoryServers().engine(), ask(max_tokens=5, stop_ids=everything))
    assert (len(turn.token_ids), turn.finish_reason) == (1, "stop")


def test_a_choice_asks_once_per_branching_point_and_adds_the_forced_tokens_itself() -> None:
    servers = MemoryServers()
    engine = servers.engine()
    turns = made(engine, *(ask(choices=CHOICES, seed=seed) for seed in range(400)))
    assert {turn.choice for turn in turns} == set(range(5))
    points = {(request.prompt_ids[4:], request.allowed) for _, request in servers.generations}
    assert points == {((), (50, 60, 70)), ((60,), (61, 62)), ((60, 62), (63, 64))}
    assert len(servers.generations) == 3  # shared by all
    assert all((sent.max_tokens, sent.top) == (1, len(sent.allowed or ())) for _, sent in servers.generations)
    for turn in turns:
        assert turn.choice is not None
        assert turn.token_ids == CHOICES[turn.choice]
        assert turn.finish_reason == "choice"
        assert turn.allowed is not None
        for i, (token, allowed) in enumerate(zip(turn.token_ids, turn.allowed, strict=True)):
            logs = distribution(servers.policy(BASE), PROMPT + turn.token_ids[:i], allowed=allowed)
            assert turn.logprobs[i] == pytest.approx(logs[token])
            assert turn.entropy[i] == pytest.approx(-sum(math.exp(p) * p for p in logs.values()))
    forced = next(turn for turn in turns if turn.choice == 4)
    assert forced.allowed is not None
    assert (forced.allowed[1], forced.logprobs[1], forced.entropy[1]) == ((71,), 0.0, 0.0)


def test_a_choice_without_alternative_asks_nobody() -> None:
    servers = MemoryServers()
    (turn,) = made(servers.engine(), ask(choices=((5, 6),)))
    assert (turn.token_ids, turn.logprobs, turn.allowed, turn.choice) == ((5, 6), (0.0, 0.0), ((5,), (6,)), 0)
    assert servers.asked == []


def test_the_token_drawn_depends_on_the_seed_alone_as_in_process() -> None:
    servers = MemoryServers("one", "two")
    engine = servers.engine()
    requests = [ask(choices=((50,), (60,)), seed=seed) for seed in range(50)]
    together = made(engine, *requests)
    p = math.exp(distribution(servers.policy(BASE), PROMPT, allowed=(50, 60))[50])
    assert [turn.choice for turn in together] == [0 if uniform(seed, 0) < p else 1 for seed in range(50)]
    assert [made(servers.engine(), request)[0].token_ids for request in requests[:5]] == [
        turn.token_ids for turn in together[:5]
    ]


def test_bias_and_temperature_go_to_the_server_and_stand_in_the_log_probabilities() -> None:
    servers = MemoryServers()
    request = ask(choices=CHOICES, bias={50: 0.8, 62: -0.5, 200: 9.0}, temperature=1.4, distribution=True)
    (found,) = made(servers.engine(), request)
    assert [sent.bias for _, sent in servers.generations] == [{50: 0.8}, {62: -0.5}, None]
    assert {sent.temperature for _, sent in servers.generations} == {1.4}
    assert found.choice_probs is not None
    assert sum(found.choice_probs) == pytest.approx(1)
    first = distribution(servers.policy(BASE), PROMPT, allowed=(50, 60, 70), bias={50: 0.8}, temperature=1.4)
    assert found.choice_probs[0] == pytest.approx(math.exp(first[50]))
    assert found.choice_probs[4] == pytest.approx(math.exp(first[70]))
    assert (found.token_ids, found.finish_reason) == ((), "choice")


def test_greedy_takes_the_likeliest_and_reports_it_at_temperature_one() -> None:
    servers = MemoryServers()
    turns = made(servers.engine(), *(ask(choices=((50,), (60,), (70,)), temperature=0.0, seed=s) for s in range(5)))
    logs = distribution(servers.policy(BASE), PROMPT, allowed=(50, 60, 70))
    best = max(logs, key=logs.__getitem__)
    assert {turn.token_ids for turn in turns} == {(best,)}
    assert turns[0].logprobs == pytest.approx((logs[best],))
    assert servers.generations[0][1].temperature == 1.0


def test_sets_beyond_what_a_server_tells_are_drawn_there_and_measured_in_parts() -> None:
    servers = MemoryServers()
    engine = servers.engine(max_top=4)
    tokens = tuple(range(100, 111))
    choices = tuple((token,) for token in tokens)
    logs = distribution(servers.policy(BASE), PROMPT, allowed=tokens, bias={105: 2.0}, temperature=0.8)
    request = ask(choices=choices, bias={105: 2.0}, temperature=0.8)
    (found,) = made(engine, replace(request, distribution=True))
    assert found.choice_probs == pytest.approx([math.exp(logs[token]) for token in tokens])
    assert all(len(sent.allowed or ()) <= 4 for _, sent in servers.generations)
    before = len(servers.generations)
    turns = made(engine, *(replace(request, seed=seed) for seed in range(6)))
    drawn = servers.generations[before:]
    assert [(sent.allowed, sent.max_tokens, sent.top) for _, sent in drawn] == [(tokens, 1, 0)] * 6
    assert len({sent.seed for _, sent in drawn}) == 6
    assert all(0 <= (sent.seed or 0) < 2**31 for _, sent in drawn)
    for turn in turns:
        assert turn.logprobs == pytest.approx((logs[turn.token_ids[0]],))
        assert turn.entropy == (-turn.logprobs[0],)  # one sample is all that is known
        assert turn.allowed == (tokens,)


def test_who_asks_the_same_at_once_shares_a_call_and_one_who_leaves_does_not_end_it() -> None:
    servers = MemoryServers()

    async def scene() -> None:
        engine = servers.engine()
        await engine.generate(ask(choices=((1,), (2,))))  # the canary is done
        servers.gate = asyncio.Event()
        request = ask(choices=CHOICES[:1] + CHOICES[4:])
        first, second = (asyncio.ensure_future(engine.generate(replace(request, seed=s))) for s in (1, 2))
        await asyncio.sleep(0.05)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        servers.gate.set()
        assert (await second).choice is not None

    go(scene())
    assert len(servers.generations) == 2


def test_when_nobody_wants_an_answer_any_more_its_call_is_cancelled() -> None:
    servers, records = MemoryServers(), Records()

    async def scene() -> None:
        engine = servers.engine(records)
        servers.gate = asyncio.Event()
        waiting = asyncio.ensure_future(engine.generate(ask(choices=((1,), (2,)))))
        await asyncio.sleep(0.05)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await asyncio.sleep(0)
        assert records.outcomes == [("", "cancelled", "cancelled")]
        servers.gate = None
        assert (await engine.generate(ask(choices=((1,), (2,))))).choice is not None

    go(scene())


# -- adapters -----------------------------------------------------------------------------------------------------


def test_a_published_version_is_asked_for_by_its_served_name() -> None:
    servers = MemoryServers()
    engine = servers.engine()
    go(engine.publish(TRAINED, Path("/somewhere")))
    turns = made(engine, *(ask(adapter=TRAINED, choices=((50,), (60,)), seed=s) for s in range(2)), ask(max_tokens=1))
    assert sorted(sent.model for _, sent in servers.generations) == ["a-v3", BASE]
    logs = distribution(servers.policy("a-v3"), PROMPT, allowed=(50, 60))
    assert turns[0].logprobs == pytest.approx((logs[turns[0].token_ids[0]],))
    assert turns[0].adapter == TRAINED


def test_version_zero_is_the_base_unless_a_directory_says_otherwise() -> None:
    servers = MemoryServers()
    engine = servers.engine()
    zero = AdapterVersion("a", 0)
    go(engine.publish(zero, None))
    made(engine, ask(adapter=zero, max_tokens=1))
    assert servers.generations[0][1].model == BASE
    assert servers.loaded == {}


def test_a_version_that_was_never_published_is_refused_by_name() -> None:
    with pytest.raises(EngineError, match="a@v3") as caught:
        made(MemoryServers().engine(), ask(adapter=TRAINED))
    assert not isinstance(caught.value, TierFailedError)
    with pytest.raises(EngineError, match="directory"):
        go(MemoryServers().engine().publish(TRAINED, None))


def test_publishing_again_forgets_what_was_measured_and_sends_nothing() -> None:
    servers = MemoryServers()
    engine = servers.engine()
    go(engine.publish(TRAINED, Path("/somewhere")))
    request = ask(adapter=TRAINED, choices=((50,), (60,)))
    made(engine, request)
    made(engine, request)
    assert len(servers.generations) == 1
    go(engine.publish(TRAINED, None))
    made(engine, request)
    assert len(servers.generations) == 2


# -- what is refused ----------------------------------------------------------------------------------------------


def test_a_server_in_raw_mode_is_refused_at_the_first_call_naming_the_flag() -> None:
    servers = MemoryServers()
    servers.raw.add("one")
    engine = servers.engine()
    with pytest.raises(UnfitServerError, match="--logprobs-mode processed_logprobs"):
        made(engine, ask(max_tokens=1))
    assert servers.generations == []
    with pytest.raises(TierFailedError, match="--logprobs-mode processed_logprobs"):
        made(engine, ask(max_tokens=1))  # and later calls say why, too


def test_an_unfit_server_leaves_the_others_alone_and_is_used_again_when_mended() -> None:
    servers, records = MemoryServers("one", "two"), Records()
    servers.raw.add("one")

    async def scene() -> None:
        engine = servers.engine(records)
        turns = await asyncio.gather(*(engine.generate(ask(max_tokens=1, seed=seed)) for seed in range(8)))
        assert {turn.server for turn in turns} == {"two"}
        assert [spec.name for spec in engine.fleet.pool.healthy()] == ["two"]
        servers.raw.clear()
        await engine.detect()
        assert {spec.name for spec in engine.fleet.pool.healthy()} == {"one", "two"}

    go(scene())
    assert {outcome for _, outcome, _ in records.outcomes} == {"ok", "fallback"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda r: without(r, "prompt_ids"), "no prompt token ids.*return_token_ids"),
        (lambda r: without(r, "token_ids"), "no token ids.*return_token_ids"),
        (lambda r: without(r, "logprobs"), "no log-probabilities.*coterie serve"),
        (lambda r: without(r, "token_ids", "logprobs"), "no token ids and no log-probabilities"),
        (lambda r: replace(r, prompt_ids=(*PROMPT[:-1], 99)), "another prompt"),
        (lambda r: replace(r, token_ids=(), logprobs=()), "no token at all"),
        (lambda r: replace(r, logprobs=(*r.logprobs, -1.0)), "log-probabilities"),
        (lambda r: replace(r, logprobs=tuple(0.5 for _ in r.logprobs)), "above 0"),
        (lambda r: replace(r, logprobs=tuple(math.nan for _ in r.logprobs)), "not a number"),
        (lambda r: replace(r, token_ids=r.token_ids * 9, logprobs=r.logprobs * 9), "were asked for"),
    ],
)
def test_answers_that_cannot_be_trained_on_are_refused(change: Any, said: str) -> None:
    servers = MemoryServers()
    servers.change = change
    with pytest.raises(UnfitServerError, match=said):
        made(servers.engine(), ask(max_tokens=3))


def test_a_choice_that_was_not_allowed_or_has_no_distribution_is_refused() -> None:
    def changed(change: Any, **fields: Any) -> RemoteEngine:
        servers = MemoryServers()
        servers.change = change
        return servers.engine(**fields)

    request = ask(choices=((50,), (60,), (70,)))
    with pytest.raises(UnfitServerError, match="--max-logprobs"):
        made(changed(lambda r: without(r, "top_logprobs")), request)
    with pytest.raises(UnfitServerError, match="processed_logprobs"):
        made(changed(lambda r: replace(r, top_logprobs=({50: -3.0, 60: -3.0, 70: -3.0},))), request)
    with pytest.raises(UnfitServerError, match="allowed_token_ids"):
        made(changed(lambda r: replace(r, token_ids=(51,)), max_top=2), request)


def test_bad_requests_are_the_requests_own_error() -> None:
    for request, said in (
        (ask(prompt_ids=()), "prompt_ids is empty"),
        (ask(max_tokens=0), "max_tokens 0"),
        (ask(distribution=True), "needs choices"),
        (ask(choices=()), "choices is empty"),
    ):
        with pytest.raises(EngineError, match=said) as caught:
            made(MemoryServers().engine(), request)
        assert not isinstance(caught.value, TierFailedError | ServerFault)


# -- failures -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [FaultKind.CONNECTION, FaultKind.TIMEOUT, FaultKind.OVERLOADED, FaultKind.SERVER])
def test_a_failing_server_is_followed_by_another_and_every_attempt_is_recorded(kind: FaultKind) -> None:
    servers, records = MemoryServers("one", "two"), Records()
    engine = servers.engine(records)
    made(engine, ask(max_tokens=1), ask(max_tokens=1))  # the canaries
    records.kept.clear()
    servers.plan["one"] = [fault(kind)] * 20
    turns = made(engine, *(ask(max_tokens=2, seed=seed) for seed in range(10)))
    assert {turn.server for turn in turns} == {"two"}
    assert [o for o in records.outcomes if o[1] == "ok"] == [("two", "ok", "")] * 10
    assert {o for o in records.outcomes if o[1] != "ok"} == {("one", "fallback", str(kind))}


def test_a_refused_request_is_not_retried_and_is_recorded_as_a_fault() -> None:
    servers, records = MemoryServers("one", "two"), Records()
    engine = servers.engine(records)
    made(engine, ask(max_tokens=1), ask(max_tokens=1))
    records.kept.clear()
    for spec in servers.specs:
        servers.plan[spec.name] = [fault(FaultKind.REJECTED, spec.name, status=400)]
    engine.goes_on = lambda: True
    with pytest.raises(ServerFault, match="planned rejected"):
        made(engine, ask(max_tokens=2))
    assert [(outcome, why) for _, outcome, why in records.outcomes] == [("fault", "rejected")]


@pytest.mark.parametrize(("goes_on", "outcome"), [(True, "fallback"), (False, "fault")])
def test_the_last_failure_is_a_fallback_where_another_tier_follows(goes_on: bool, outcome: str) -> None:
    servers, records = MemoryServers(), Records()
    engine = servers.engine(records, timeout_s=0.3)
    engine.goes_on = lambda: goes_on
    servers.ill.add("one")
    servers.plan["one"] = [fault(FaultKind.CONNECTION)] * 100
    with pytest.raises(EngineError):
        made(engine, ask(max_tokens=1))
    assert records.outcomes[-1][1] == outcome
    assert all(o == "fallback" for _, o, _ in records.outcomes[:-1])


def test_a_record_says_all_about_a_call() -> None:
    servers, records = MemoryServers(), Records()
    engine = servers.engine(records, decode=lambda ids: "".join(chr(i) for i in ids))
    go(engine.publish(TRAINED, Path("/x")))
    made(engine, ask(adapter=TRAINED, max_tokens=3), ask(choices=((65,), (66,))))
    text, choice = sorted(records.kept, key=lambda record: record.model)
    assert (text.tier, text.server, text.model, text.adapter, text.outcome) == (Tier.HTTP, "one", "a", TRAINED, "ok")
    assert (text.prompt_tokens, text.completion_tokens, text.latency_s) == (4, 3, 0.25)
    assert text.queued_s >= 0
    # what was drawn is drawn here, so the line shows what the server told
    assert sorted(part.split()[0] for part in choice.text.split("|")) == ["A", "B"]
    assert sum(int(part.split()[1].rstrip("%")) for part in choice.text.split("|")) in (99, 100, 101)


# -- messages -----------------------------------------------------------------------------------------------------

SAID = (("system", "be brief"), ("user", "well?"), ("assistant", "I say"))


def chat_request(servers: MemoryServers, **fields: Any) -> GenerateRequest:
    messages = [{"role": role, "content": text} for role, text in SAID]
    ids = tuple(servers.tokenizer.chat(messages, continued=True))
    return ask(prompt_ids=ids, messages=SAID, **fields)


def test_through_camel_prompts_go_as_messages_and_the_answer_is_begun() -> None:
    servers = MemoryServers(tier=Tier.CAMEL)
    engine = servers.engine(decode=servers.tokenizer.decode)
    yes, yet, no = (tuple(servers.tokenizer.encode(word)) for word in (" yes", " yet", " no"))
    turns = made(engine, *(chat_request(servers, choices=(yes, yet, no), seed=seed) for seed in range(300)))
    assert {turn.choice for turn in turns} == {0, 1, 2}
    assert {turn.tier for turn in turns} == {Tier.CAMEL}
    sent = sorted((request.messages[-1]["content"] for _, request in servers.generations), key=len)
    assert sent == ["I say ", "I say ye"]
    assert all(request.prompt_ids == () for _, request in servers.generations)
    (free,) = made(engine, chat_request(servers, max_tokens=2))
    assert len(free.token_ids) == 2


def test_another_template_on_the_server_is_found_out_and_does_not_retire_it() -> None:
    servers = MemoryServers(tier=Tier.CAMEL)
    engine = servers.engine()
    request = replace(chat_request(servers, max_tokens=2), prompt_ids=PROMPT)
    with pytest.raises(TierFailedError, match="chat template"):
        made(engine, request)
    assert engine.fleet.pool.healthy()
    with pytest.raises(TierFailedError, match="messages"):
        made(engine, ask(max_tokens=2))


def test_detection_says_why_no_server_can_answer() -> None:
    servers = MemoryServers("one", "two")
    servers.ill.add("one")
    servers.raw.add("two")
    engine = servers.engine()
    with pytest.raises(TierFailedError, match=r"one: connection: refused; two: .*--logprobs-mode"):
        go(engine.detect())
    servers.raw.clear()
    go(servers.engine().detect())


def test_closing_closes_everything_and_twice_is_fine() -> None:
    servers = MemoryServers()
    engine = servers.engine()

    async def scene() -> None:
        await engine.generate(ask(max_tokens=1))
        await engine.close()
        await engine.close()
        with pytest.raises(EngineError):
            await engine.generate(ask(max_tokens=1))

    go(scene())
    assert servers.closed == 2


def test_an_engine_lives_on_in_the_next_event_loop() -> None:
    servers = MemoryServers()
    engine = servers.engine()
    for seed in range(3):
        (turn,) = made(engine, ask(choices=CHOICES, seed=seed))
        assert turn.choice is not None


def test_an_answer_to_something_else_is_never_taken() -> None:
    """A reply is checked against the very request it answers, not against what any other asked."""
    servers = MemoryServers()

    def swap(reply: WireReply) -> WireReply:
        return replace(reply, prompt_ids=tuple(reversed(reply.prompt_ids or ())))

    engine = servers.engine()
    made(engine, ask(max_tokens=1))
    servers.change = swap
    with pytest.raises(UnfitServerError, match="another prompt"):
        made(engine, ask(choices=((1,), (2,))))

"""Which token may come next: constraints on an answer, from choices, schemas and tools to sets of tokens.

    StructuredOutputs | tools ──► Grammars.compile (cached; off the event loop) ──► fresh() ──► a Constraint per answer

Choices follow the token trie of their own tokenisation, as everywhere in Coterie: the probability of an answer is that
of the constrained policy. Everything else is a grammar of llguidance over the tokens' bytes. JSON is compact
({"a": 1, "b": 2}): a small model that may write white space writes nothing else.
"""

from __future__ import annotations

import asyncio
import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, grammar_from

from coterie.errors import EngineError
from coterie.inference.local.choices import TrieNode, build_trie
from coterie.serve.engine import FREE, Step
from coterie.serve.errors import rejected
from coterie.serve.protocol import StructuredOutputs
from coterie.serve.text import Text
from coterie.serve.tools import call_grammar

JSON_STYLE: Mapping[str, Any] = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""Options of llguidance's JSON compiler: JSON as `json.dumps` writes it."""

_MAX_CHOICES = 4096
_CACHED = 64


class Constraint(Protocol):
    """What one answer may still say."""

    def step(self) -> Step:
        """The tokens that may come next."""
        ...

    def accept(self, token_id: int) -> None:
        """Go on after this token, which was allowed."""
        ...

    @property
    def ended(self) -> bool:
        """Whether the answer is complete and nothing may follow."""
        ...


class Compiled(Protocol):
    """A constraint that has been understood, for any number of answers."""

    def fresh(self) -> Constraint: ...


class ChoiceConstraint:
    """One of several texts, by their token trie."""

    def __init__(self, node: TrieNode) -> None:
        self._node = node

    def step(self) -> Step:
        return Step(ids=self._node.allowed)

    def accept(self, token_id: int) -> None:
        self._node = self._node.children[token_id]

    @property
    def ended(self) -> bool:
        return self._node.final


class Choices:
    """Compiled choices."""

    def __init__(self, root: TrieNode) -> None:
        self._root = root

    def fresh(self) -> Constraint:
        return ChoiceConstraint(self._root)


class GrammarConstraint:
    """A grammar, by llguidance."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    def step(self) -> Step:
        mask = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint32)
        if self._matcher.is_error():
            raise rejected(f"the grammar became too complex: {self._matcher.get_error()}", "structured_outputs")
        return Step(mask=mask)

    def accept(self, token_id: int) -> None:
        if not self._matcher.consume_token(token_id):
            raise EngineError(f"the grammar refuses token {token_id}: {self._matcher.get_error()}")

    @property
    def ended(self) -> bool:
        return self._matcher.is_stopped()


class Grammar:
    """A compiled grammar."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    def fresh(self) -> Constraint:
        return GrammarConstraint(self._matcher.deep_copy())


class AllowedOnly:
    """A fixed set of tokens, for as long as the answer lasts."""

    ended = False

    def __init__(self, ids: tuple[int, ...]) -> None:
        self._step = Step(ids=ids)

    def step(self) -> Step:
        return self._step

    def accept(self, token_id: int) -> None:
        """Nothing changes."""


class Unconstrained:
    """Anything."""

    ended = False

    def step(self) -> Step:
        return FREE

    def accept(self, token_id: int) -> None:
        """Nothing changes."""


class Grammars:
    """Makes constraints for one tokenizer."""

    def __init__(self, text: Text, vocabulary: int, stop_ids: Sequence[int]) -> None:
        self._text = text
        self._vocabulary, self._stop_ids = vocabulary, tuple(stop_ids)
        self._cache: OrderedDict[str, Grammar] = OrderedDict()
        self._tokenizer: LLTokenizer | None = None
        self._making = asyncio.Lock()

    async def structured(self, wanted: StructuredOutputs) -> Compiled | None:
        """The constraint of `structured_outputs`; None where it has none. Raises `ApiError` (400) for a bad one."""
        if wanted.choice is not None:
            return self.choices(wanted.choice)
        try:
            if wanted.json_object:
                grammar = _json_grammar({"type": "object"})
            elif wanted.json_ is not None:
                schema = json.loads(wanted.json_) if isinstance(wanted.json_, str) else wanted.json_
                grammar = _json_grammar(schema)
            elif wanted.regex is not None:
                grammar = LLMatcher.grammar_from_regex(wanted.regex)
            elif wanted.grammar is not None:
                grammar = grammar_from("grammar", wanted.grammar)
            else:
                return None
        except ValueError as error:
            raise rejected(f"structured output cannot be read: {error}", "structured_outputs") from error
        return await self._compile(grammar, "structured_outputs")

    async def tools(
        self, tools: Sequence[tuple[str, Mapping[str, Any] | None]], *, required: bool, parallel: bool
    ) -> Compiled:
        """The constraint of an answer that may or must call tools. Raises `ApiError` (400) for a bad schema."""
        grammar = call_grammar(tools, required=required, parallel=parallel, options=JSON_STYLE)
        return await self._compile(grammar, "tools")

    def choices(self, texts: Sequence[str]) -> Compiled:
        """One of `texts`. Raises `ApiError` (400) for an empty text, too many, or two that are the same."""
        if len(texts) > _MAX_CHOICES:
            raise rejected(f"at most {_MAX_CHOICES} choices, got {len(texts)}", "structured_outputs")
        tokens = tuple(self._text.encode(text, special=False) for text in dict.fromkeys(texts))
        try:
            return Choices(build_trie(tokens, self._stop_ids[0] if self._stop_ids else None))
        except EngineError as error:
            raise rejected(str(error), "structured_outputs") from error

    async def _compile(self, grammar: str, param: str) -> Compiled:
        found = self._cache.get(grammar)
        if found is None:
            async with self._making:
                # hundreds of milliseconds for a large schema, most of it without the interpreter lock
                matcher = await asyncio.to_thread(self._matcher, grammar)
            if matcher.is_error():
                raise rejected(f"this grammar cannot be used: {matcher.get_error()}", param)
            found = self._cache[grammar] = Grammar(matcher)
            while len(self._cache) > _CACHED:
                self._cache.popitem(last=False)
        self._cache.move_to_end(grammar)
        return found

    def _matcher(self, grammar: str) -> LLMatcher:
        if self._tokenizer is None:
            backend = self._text.tokenizer.backend_tokenizer.to_str()
            self._tokenizer = LLTokenizer(backend, n_vocab=self._vocabulary, eos_token=list(self._stop_ids))
        return LLMatcher(self._tokenizer, grammar, log_level=0, limits=LLParserLimits(verbose_errors=False))


def _json_grammar(schema: Any) -> str:
    if not isinstance(schema, dict | bool):
        raise ValueError("a JSON schema is an object")
    return LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=dict(JSON_STYLE))  # type: ignore[arg-type]

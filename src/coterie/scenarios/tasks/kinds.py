"""The five kinds of task: how each is made, asked, and checked.

A kind makes `content` (plain values that stand on the task), turns it into a question in either language, and says
how right an answer is, in [0, 1]. Difficulty, 0..1, changes what is made as each docstring says. Content of the two
splits comes from disjoint words and numbers (`words.py`).
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from typing import Any, Protocol

from coterie.prompts.loader import text
from coterie.scenarios.tasks.words import numbers, translate, words
from coterie.types import Split, TaskType

Content = Mapping[str, Any]
_FILE = "tasks"


class Kind(Protocol):
    """One kind of task."""

    max_tokens: int
    """Of a free-text answer in English; Chinese has more."""
    everyone_advises: bool
    """True where what each seat knows is needed by the others, whoever leads."""

    def make(self, rng: random.Random, difficulty: float, split: Split, seats: int) -> dict[str, Any]:
        """Content of one task."""
        ...

    def question(self, content: Content, language: str, seat: int) -> str:
        """What seat number `seat` is asked."""
        ...

    def choices(self, content: Content, language: str) -> tuple[str, ...] | None:
        """Possible answers, or None for free text."""
        ...

    def accuracy(self, content: Content, language: str, answer: str, ended: bool) -> float:
        """How right `answer` is; `ended` is False for free text that was cut off at its limit."""
        ...

    def advice(self, content: Content, language: str, seat: int) -> tuple[str, tuple[str, ...]] | None:
        """(question, choices) of an advice turn; None: the advice is the answer one would give oneself."""
        ...


class Classification:
    """Label a text. Below 0.5: is a review positive or negative (from 0.25, with a first half that does not matter);
    from 0.5: which kind of thing a sentence names, of three labels, from 0.75 of four."""

    max_tokens = 8
    everyone_advises = False
    topics = ("animal", "food", "clothing", "tool")

    def make(self, rng: random.Random, difficulty: float, split: Split, seats: int) -> dict[str, Any]:
        if difficulty < 0.5:
            answer = rng.choice(("positive", "negative"))
            made = {
                "form": "sentiment", "labels": ["positive", "negative"], "answer": answer,
                "adjective": rng.choice(words(answer, split)), "subject": rng.choice(words("subject", split)),
            }  # fmt: skip
            return {**made, "opener": rng.choice(words("opener", split))} if difficulty >= 0.25 else made
        labels = list(self.topics[: 3 if difficulty < 0.75 else 4])
        answer = rng.choice(labels)
        return {
            "form": "topic", "labels": labels, "answer": answer,
            "noun": rng.choice(words(answer, split)), "place": rng.choice(words("place", split)),
        }  # fmt: skip

    def question(self, content: Content, language: str, seat: int) -> str:
        known = {k: translate(str(v), language) for k, v in content.items() if k in _WORD_KEYS}
        if content["form"] == "topic":
            told = text(language, _FILE, "sentence", **known)
        else:
            told = text(language, _FILE, "review_long" if "opener" in known else "review", **known)
        return text(language, _FILE, content["form"], text=told, labels=self.choices(content, language))

    def choices(self, content: Content, language: str) -> tuple[str, ...]:
        return tuple(translate(label, language) for label in content["labels"])

    def accuracy(self, content: Content, language: str, answer: str, ended: bool) -> float:
        return float(answer == translate(content["answer"], language))

    def advice(self, content: Content, language: str, seat: int) -> None:
        return None


_WORD_KEYS = ("adjective", "subject", "opener", "noun", "place")


class Reasoning:
    """The answer is computed: the largest of two numbers, from 0.3 of three, from 0.7 of four. The harder, the closer
    they lie."""

    max_tokens = 8
    everyone_advises = False

    def make(self, rng: random.Random, difficulty: float, split: Split, seats: int) -> dict[str, Any]:
        pool = numbers(split, 10, 99)
        reach = max(20, round(80 * (1 - difficulty)))
        first = rng.choice(pool)
        near = [n for n in pool if n != first and abs(n - first) <= reach]
        found = [first, *rng.sample(near, 1 if difficulty < 0.3 else 2 if difficulty < 0.7 else 3)]
        rng.shuffle(found)
        return {"numbers": found, "answer": max(found)}

    def question(self, content: Content, language: str, seat: int) -> str:
        return text(language, _FILE, "reasoning", numbers=content["numbers"])

    def choices(self, content: Content, language: str) -> tuple[str, ...]:
        return tuple(str(n) for n in content["numbers"])

    def accuracy(self, content: Content, language: str, answer: str, ended: bool) -> float:
        return float(answer == str(content["answer"]))

    def advice(self, content: Content, language: str, seat: int) -> None:
        return None


class Generation:
    """Write a line that meets stated, checkable constraints: it holds the given words (one, from 0.5 two), has at most
    so many words (characters in Chinese), and ends with the given mark. Accuracy is the share of constraints met;
    a line that does not end by itself meets neither length nor ending."""

    max_tokens = 8
    everyone_advises = False

    def make(self, rng: random.Random, difficulty: float, split: Split, seats: int) -> dict[str, Any]:
        chosen = rng.sample(words("thing", split), 1 if difficulty < 0.5 else 2)
        return {"words": chosen, "limit": 5 - round(2 * difficulty), "mark": rng.choice("!?")}

    def question(self, content: Content, language: str, seat: int) -> str:
        wanted = [translate(w, language) for w in content["words"]]
        limit = content["limit"] * (2 if language == "zh" else 1)
        mark = _FULL_WIDTH[content["mark"]] if language == "zh" else content["mark"]
        return text(language, _FILE, "generation", words=wanted, limit=limit, mark=mark)

    def choices(self, content: Content, language: str) -> None:
        return None

    def accuracy(self, content: Content, language: str, answer: str, ended: bool) -> float:
        wanted = [translate(w, language) for w in content["words"]]
        if language == "zh":
            length, limit = len(re.findall(r"\w", answer)), content["limit"] * 2
            met = [w in answer for w in wanted]
        else:
            said = re.findall(r"[a-z']+", answer.lower())
            length, limit = len(said), content["limit"]
            met = [w in said for w in wanted]
        marks = (content["mark"], _FULL_WIDTH[content["mark"]])  # either is an end, whatever the language
        met += [ended and 0 < length <= limit, ended and answer.endswith(marks)]
        return sum(met) / len(met)

    def advice(self, content: Content, language: str, seat: int) -> tuple[str, tuple[str, ...]]:
        question = self.question(content, language, seat) + "\n" + text(language, _FILE, "ask_hint")
        return question, tuple(text(language, _FILE, "hints").split("|"))


_FULL_WIDTH = {"!": "！", "?": "？"}


class Optimization:
    """Buy the cheapest of two offers, from 0.4 of three, from 0.8 of four. Accuracy is measured against the optimum:
    1 for the cheapest, 0 for the dearest, in between by price."""

    max_tokens = 8
    everyone_advises = False

    def make(self, rng: random.Random, difficulty: float, split: Split, seats: int) -> dict[str, Any]:
        count = 2 if difficulty < 0.4 else 3 if difficulty < 0.8 else 4
        names = rng.sample(words("goods", split), count)
        prices = rng.sample(numbers(split, 10, 99), count)
        return {"offers": [[name, price] for name, price in zip(names, prices, strict=True)]}

    def question(self, content: Content, language: str, seat: int) -> str:
        offers = [(translate(name, language), price) for name, price in content["offers"]]
        return text(language, _FILE, "optimization", offers=offers)

    def choices(self, content: Content, language: str) -> tuple[str, ...]:
        return tuple(translate(name, language) for name, _ in content["offers"])

    def accuracy(self, content: Content, language: str, answer: str, ended: bool) -> float:
        prices = {translate(name, language): price for name, price in content["offers"]}
        low, high = min(prices.values()), max(prices.values())
        return float((high - prices[answer]) / (high - low))

    def advice(self, content: Content, language: str, seat: int) -> None:
        return None


class Collaboration:
    """What is needed is split between the seats: one knows the colour, the next the thing, and so on in turn. Only
    who hears somebody with the other half can do better than guess. Two colours and two things are possible; three of
    each from 0.4."""

    max_tokens = 8
    everyone_advises = True

    def make(self, rng: random.Random, difficulty: float, split: Split, seats: int) -> dict[str, Any]:
        count = 2 if difficulty < 0.4 else 3
        colours = rng.sample(words("colour", split), count)
        items = rng.sample(words("item", split), count)
        return {"colours": colours, "items": items, "colour": rng.choice(colours), "item": rng.choice(items)}

    def _clue(self, content: Content, language: str, seat: int) -> str:
        return translate(content["item" if seat % 2 else "colour"], language)

    def question(self, content: Content, language: str, seat: int) -> str:
        clue = self._clue(content, language, seat)
        return text(language, _FILE, "collaboration", clue=clue)

    def choices(self, content: Content, language: str) -> tuple[str, ...]:
        space = "" if language == "zh" else " "
        return tuple(
            translate(colour, language) + space + translate(item, language)
            for colour in content["colours"]
            for item in content["items"]
        )

    def accuracy(self, content: Content, language: str, answer: str, ended: bool) -> float:
        space = "" if language == "zh" else " "
        right = translate(content["colour"], language) + space + translate(content["item"], language)
        return float(answer == right)

    def advice(self, content: Content, language: str, seat: int) -> tuple[str, tuple[str, ...]]:
        question = self.question(content, language, seat) + "\n" + text(language, _FILE, "ask_clue")
        options = content["items" if seat % 2 else "colours"]
        return question, tuple(translate(option, language) for option in options)


KINDS: Mapping[TaskType, Kind] = {
    TaskType.CLASSIFICATION: Classification(),
    TaskType.REASONING: Reasoning(),
    TaskType.GENERATION: Generation(),
    TaskType.OPTIMIZATION: Optimization(),
    TaskType.COLLABORATION: Collaboration(),
}

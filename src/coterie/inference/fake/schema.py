"""Text that fits a JSON schema or a list of tools, drawn at random: what the fake says where a grammar binds it."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

_WORDS = ("amber", "birch", "cedar", "delta", "ember", "fjord", "grove", "heron")


def instance(schema: Mapping[str, Any], rng: random.Random, root: Mapping[str, Any] | None = None) -> Any:
    """A value that fits `schema` (the subset of JSON Schema that tools and pydantic models use)."""
    root = schema if root is None else root
    if "$ref" in schema:
        target: Any = root
        for part in str(schema["$ref"]).removeprefix("#/").split("/"):
            target = target[part]
        return instance(target, rng, root)
    if "const" in schema:
        return schema["const"]
    if "enum" in schema:
        return rng.choice(schema["enum"])
    for key in ("anyOf", "oneOf"):
        if key in schema:
            return instance(schema[key][0], rng, root)
    if "allOf" in schema:
        merged: dict[str, Any] = {}
        for part in schema["allOf"]:
            merged |= part
        return instance(merged, rng, root)
    kind = schema.get("type", "object" if "properties" in schema else "string")
    if isinstance(kind, Sequence) and not isinstance(kind, str):
        kind = kind[0]
    return _MAKERS[kind](schema, rng, root)


def _integer(schema: Mapping[str, Any], rng: random.Random, root: Mapping[str, Any]) -> int:
    low = int(schema.get("minimum", schema.get("exclusiveMinimum", 0) + ("exclusiveMinimum" in schema)))
    high = int(schema.get("maximum", schema.get("exclusiveMaximum", low + 10) - ("exclusiveMaximum" in schema)))
    return rng.randint(low, max(low, high))


def _number(schema: Mapping[str, Any], rng: random.Random, root: Mapping[str, Any]) -> float:
    low = float(schema.get("minimum", 0.0))
    return round(rng.uniform(low, float(schema.get("maximum", low + 1.0))), 3)


def _string(schema: Mapping[str, Any], rng: random.Random, root: Mapping[str, Any]) -> str:
    text = rng.choice(_WORDS)
    while len(text) < schema.get("minLength", 0):
        text += " " + rng.choice(_WORDS)
    return text[: schema.get("maxLength")]


def _array(schema: Mapping[str, Any], rng: random.Random, root: Mapping[str, Any]) -> list[Any]:
    low = int(schema.get("minItems", 1))
    count = rng.randint(low, max(low, int(schema.get("maxItems", low + 1))))
    return [instance(schema.get("items") or {"type": "string"}, rng, root) for _ in range(count)]


def _object(schema: Mapping[str, Any], rng: random.Random, root: Mapping[str, Any]) -> dict[str, Any]:
    return {name: instance(part, rng, root) for name, part in (schema.get("properties") or {}).items()}


_MAKERS: dict[str, Any] = {
    "integer": _integer,
    "number": _number,
    "string": _string,
    "array": _array,
    "object": _object,
    "boolean": lambda schema, rng, root: rng.random() < 0.5,
    "null": lambda schema, rng, root: None,
}


def tool_call(tools: Sequence[Mapping[str, Any]], choice: Any, rng: random.Random) -> tuple[str, Mapping[str, Any]]:
    """(name, arguments) of a call of one of the tools; of the one that `choice` names, where it names one."""
    functions = [tool["function"] for tool in tools]
    if isinstance(choice, Mapping):
        wanted = choice["function"]["name"]
        functions = [function for function in functions if function["name"] == wanted]
        if not functions:
            raise ValueError(f"The tool {wanted} in tool_choice is not among the tools.")
    function = rng.choice(functions)
    return function["name"], instance(function.get("parameters") or {"type": "object"}, rng)

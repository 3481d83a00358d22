"""A model's chat template, read from its directory and run in the sandbox it is meant for; without transformers.

tokenizer_config.json, chat_template.jinja -> (source, special tokens) -> messages -> text
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from coterie.errors import BaseModelError

Message = Mapping[str, Any]
"""One OpenAI chat message."""

_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")


class ChatTemplate:
    """Renders chats as transformers' `apply_chat_template` does."""

    def __init__(self, source: str, special: Mapping[str, str]) -> None:
        """`special`: tokens the template may name ("bos_token", …).

        Raises:
            BaseModelError: the source is empty or no template.
        """
        from jinja2.exceptions import TemplateError
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = to_json
        environment.globals.update(raise_exception=_refuse, strftime_now=_now)
        self._failures = (TemplateError, TypeError, ValueError)
        self._special = dict(special)
        # marks for training on the assistant's part only; they make no text
        plain = re.sub(r"\{%-?\s*(?:end)?generation\s*-?%\}", "", source)
        if not plain:
            raise BaseModelError("the model has no chat template; use an instruct model, or add chat_template.jinja")
        try:
            self._template = environment.from_string(plain)
        except TemplateError as error:
            raise BaseModelError(f"the model's chat template cannot be read: {error}") from error

    def render(self, messages: Sequence[Message], answer: bool) -> str:
        """The chat's text; with `answer` the assistant's turn is opened.

        Raises:
            BaseModelError: the template refuses these messages (a role it does not know, say).
        """
        try:
            return self._template.render(
                messages=messages, tools=None, documents=None, add_generation_prompt=answer, **self._special
            )
        except self._failures as error:
            raise BaseModelError(f"the model's chat template refuses a chat: {error}") from error


def template_of(directory: Path) -> tuple[str, dict[str, str]]:
    """The template's source, empty where there is none, and the special tokens it may name, empty where there is none.

    Raises:
        BaseModelError: tokenizer_config.json is damaged.
    """
    settings: dict[str, Any] = {}
    if (path := directory / "tokenizer_config.json").is_file():
        try:
            settings = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise BaseModelError(f"{path} is damaged: {error}") from error
    special = {}
    for key in _SPECIAL:
        token = settings.get(key)
        special[key] = token if isinstance(token, str) else str((token or {}).get("content", ""))
    if (path := directory / "chat_template.jinja").is_file():
        return path.read_text(encoding="utf-8"), special
    source = settings.get("chat_template") or ""
    if isinstance(source, list):  # several by name
        named = {entry["name"]: entry["template"] for entry in source}
        source = named.get("default", "")
    return str(source), special


def to_json(value: Any, **options: Any) -> str:
    """JSON as chat templates expect it of their filter `tojson`: not escaped for HTML."""
    return json.dumps(value, ensure_ascii=False, default=str, indent=options.get("indent"))


def _refuse(message: str) -> NoReturn:
    from jinja2.exceptions import TemplateError

    raise TemplateError(message)


def _now(form: str) -> str:
    return datetime.now().strftime(form)

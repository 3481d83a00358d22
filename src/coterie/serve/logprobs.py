"""Log-probabilities in the three shapes clients know: of chats, of completions, of prompts.

JSON has no infinity: what is below -9999 is -9999, as in vLLM.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from coterie.serve.engine import Token
from coterie.serve.text import Text

_LEAST = -9999.0


class Shapes:
    """How tokens are written in one reply."""

    def __init__(self, text: Text, *, as_ids: bool) -> None:
        """`as_ids`: "token_id:17" in place of a token's text."""
        self._text, self._as_ids = text, as_ids

    def name(self, token_id: int) -> str:
        """A token as it is written."""
        return f"token_id:{token_id}" if self._as_ids else self._text.token(token_id)

    def chat(self, tokens: Sequence[Token], top: int) -> dict[str, Any]:
        """`choices[].logprobs` of a chat."""
        content = []
        for token in tokens:
            entry = self._entry(token.token_id, token.logprob)
            entry["top_logprobs"] = [self._entry(*one) for one in token.top[:top]]
            content.append(entry)
        return {"content": content}

    def completion(self, tokens: Sequence[Token | int], top: int, offset: int = 0) -> dict[str, Any]:
        """`choices[].logprobs` of a completion.

        Args:
            tokens: a bare id stands for the first token of a prompt, which has no log-probability.
            offset: characters before the first of them.
        """
        names, values, tops, offsets = [], [], [], []
        for token in tokens:
            if isinstance(token, int):
                name, value, best = self.name(token), None, None
            else:
                name, value = self.name(token.token_id), max(token.logprob, _LEAST)
                best = {name: value, **{self.name(i): max(lp, _LEAST) for i, lp in token.top[:top]}}
            names.append(name)
            values.append(value)
            tops.append(best)
            offsets.append(offset)
            offset += len(name)
        return {"text_offset": offsets, "token_logprobs": values, "tokens": names, "top_logprobs": tops}

    def prompt(self, tokens: Sequence[Token]) -> list[dict[str, Any] | None]:
        """`prompt_logprobs`: None for the first token, then by token id the token itself and the most probable."""
        shown: list[dict[str, Any] | None] = [None]
        for token in tokens:
            entry = {str(token.token_id): self._ranked(token.token_id, token.logprob, token.rank)}
            for rank, (token_id, logprob) in enumerate(token.top, start=1):
                entry.setdefault(str(token_id), self._ranked(token_id, logprob, rank))
            shown.append(entry)
        return shown

    def _entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        name = self.name(token_id)
        return {"token": name, "logprob": max(logprob, _LEAST), "bytes": list(name.encode(errors="replace"))}

    def _ranked(self, token_id: int, logprob: float, rank: int) -> dict[str, Any]:
        return {"logprob": max(logprob, _LEAST), "rank": rank, "decoded_token": self._text.token(token_id)}


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, Any]:
    """`usage`."""
    return {
        "prompt_tokens": prompt_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "completion_tokens": completion_tokens,
        "prompt_tokens_details": None,
    }

"""Requests as vLLM reads them: OpenAI's fields, vLLM's own, and whatever else a client sends, which is ignored.

What would change an answer and is not supported is refused with its name, never ignored. Checks that need the model
(vocabulary, context) are made in `plan.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from coterie.serve.errors import rejected

_INT64 = 2**63


class Body(BaseModel):
    """Of a request; unknown fields are ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class StreamOptions(Body):
    """What a stream holds beside its text."""

    include_usage: bool | None = False
    continuous_usage_stats: bool | None = False


class JsonSchemaFormat(Body):
    """`response_format.json_schema`."""

    name: str = ""
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")


class ResponseFormat(Body):
    """`response_format`."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> ResponseFormat:
        if self.type == "json_schema" and (self.json_schema is None or self.json_schema.schema_ is None):
            raise ValueError(
                "When response_format type is 'json_schema', the 'json_schema' field must be provided with its schema."
            )
        return self


class StructuredOutputs(Body):
    """vLLM's `structured_outputs`; at most one of its fields."""

    choice: list[str] | None = None
    json_: dict[str, Any] | str | None = Field(default=None, alias="json")
    regex: str | None = None
    grammar: str | None = None
    json_object: bool | None = None

    @model_validator(mode="after")
    def _one(self) -> StructuredOutputs:
        given = [
            v for v in (self.choice, self.json_, self.regex, self.grammar, self.json_object or None) if v is not None
        ]
        if len(given) > 1:
            raise ValueError("You can only use one kind of structured outputs constraint but multiple are specified.")
        if self.choice is not None and not self.choice:
            raise ValueError("structured_outputs.choice must not be empty.")
        return self


class SamplingBody(Body):
    """Fields that /v1/completions and /v1/chat/completions share."""

    model: str | None = None
    n: int | None = Field(default=1, ge=1)
    temperature: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1)
    min_p: float | None = Field(default=None, ge=0, le=1)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    seed: int | None = Field(default=None, ge=-_INT64, lt=_INT64)
    stop: str | Annotated[list[str], Field(max_length=64)] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: int = Field(default=0, ge=0)
    skip_special_tokens: bool = True
    logit_bias: dict[int, Annotated[float, Field(allow_inf_nan=False)]] | None = None
    allowed_token_ids: list[int] | None = None
    prompt_logprobs: int | None = Field(default=None, ge=-1)
    cache_salt: str | None = Field(default=None, min_length=1, max_length=128, pattern=r"^[^@/\\\x00]*$")
    """Changes no answer: cached keys never outlive the adapter they were computed with."""
    truncate_prompt_tokens: int | None = Field(default=None, ge=-1)
    add_special_tokens: bool | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_choice: list[str] | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_grammar: str | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    request_id: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _supported(cls, data: Any) -> Any:
        if isinstance(data, Mapping):
            for name, neutral in _UNSUPPORTED.items():
                if data.get(name) not in neutral:
                    raise ValueError(f"`{name}` is not supported by this server.")
        return data

    @model_validator(mode="after")
    def _fits(self) -> SamplingBody:
        if self.stream_options and not self.stream:
            raise ValueError("Stream options can only be defined when `stream=True`.")
        if self.stream and self.prompt_logprobs:
            raise ValueError("`prompt_logprobs` are not available when `stream=True`.")
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise ValueError("allowed_token_ids is not None and empty!")
        if "" in self.stops:
            raise ValueError("stop cannot contain an empty string.")
        if self.structure is not None and self.allowed_token_ids is not None:
            raise ValueError("allowed_token_ids and structured outputs cannot be used together.")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """Stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def structure(self) -> StructuredOutputs | None:
        """The constraint on the answer, from whichever field brings it; `response_format` wins, as in vLLM."""
        if self.response_format is not None and self.response_format.type == "json_object":
            return StructuredOutputs(json_object=True)
        if self.response_format is not None and self.response_format.json_schema is not None:
            return StructuredOutputs.model_validate({"json": self.response_format.json_schema.schema_})
        if self.structured_outputs is not None:
            return self.structured_outputs
        legacy = {
            "choice": self.guided_choice,
            "json": self.guided_json,
            "regex": self.guided_regex,
            "grammar": self.guided_grammar,
        }
        given = {name: value for name, value in legacy.items() if value is not None}
        return StructuredOutputs.model_validate(given) if given else None


_UNSUPPORTED: dict[str, tuple[object, ...]] = {
    # field -> values that change nothing
    "use_beam_search": (None, False),
    "repetition_penalty": (None, 1, 1.0),
    "bad_words": (None, []),
    "suffix": (None, ""),
    "prompt_embeds": (None,),
    "logprob_token_ids": (None, []),
    "repetition_detection": (None,),
    "best_of": (None, 1),
}


class CompletionBody(SamplingBody):
    """POST /v1/completions."""

    prompt: list[Annotated[int, Field(ge=0)]] | list[list[Annotated[int, Field(ge=0)]]] | str | list[str]
    max_tokens: int | None = Field(default=None, ge=0)
    logprobs: int | None = Field(default=None, ge=-1)
    echo: bool | None = False

    @model_validator(mode="after")
    def _has_prompt(self) -> CompletionBody:
        if not self.prompt or (isinstance(self.prompt, list) and any(part in ("", []) for part in self.prompt)):
            raise ValueError("Either prompt or prompt_embeds must be provided and non-empty.")
        if self.stream and self.echo and self.logprobs is not None:
            raise ValueError("`echo` with `logprobs` is not supported by this server when `stream=True`.")
        return self


class FunctionDefinition(Body):
    """What a tool is."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,128}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(Body):
    """One entry of `tools`."""

    type: Literal["function"] = "function"
    function: FunctionDefinition


class NamedFunction(Body):
    """The function of a named `tool_choice`."""

    name: str


class NamedToolChoice(Body):
    """`tool_choice` that names a tool."""

    type: Literal["function"] = "function"
    function: NamedFunction


_RENDERING = frozenset(
    ("conversation", "chat_template", "tools", "documents", "add_generation_prompt", "continue_final_message",
     "tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict",
     "return_assistant_tokens_mask", "tokenizer_kwargs")
)  # fmt: skip
"""How the server calls the template; a request sets what the template itself asks for."""


class ChatBody(SamplingBody):
    """POST /v1/chat/completions."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(default=0, ge=-1)
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None
    parallel_tool_calls: bool | None = True
    echo: bool = False
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        if data.get("tools") == []:
            raise ValueError(
                "`tools` must not be an empty array. Either provide at least one tool or omit the field entirely."
            )
        if data.get("chat_template"):
            raise ValueError("`chat_template` is not supported by this server; it uses the model's own.")
        wanted = data.get("chat_template_kwargs")
        fixed = sorted(_RENDERING.intersection(wanted)) if isinstance(wanted, Mapping) else []
        if fixed:
            raise ValueError(f"chat_template_kwargs.{fixed[0]} is not for requests to set.")
        if data.get("continue_final_message"):
            if data.get("add_generation_prompt"):
                raise ValueError("Cannot set both `continue_final_message` and `add_generation_prompt` to True.")
            return {**data, "add_generation_prompt": False}
        return data

    @model_validator(mode="after")
    def _tools_fit(self) -> ChatBody:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("when using `top_logprobs`, `logprobs` must be set to true.")
        if self.tool_choice not in (None, "none"):
            if not self.tools:
                raise ValueError("When using `tool_choice`, `tools` must be set.")
            if self.forced_tool is not None and self.forced_tool not in {tool.function.name for tool in self.tools}:
                raise ValueError("The tool specified in `tool_choice` does not match any of the specified `tools`")
            if self.structure is not None and self.tool_choice != "auto":
                raise ValueError("You can only either use constraints for structured outputs or tools, not both.")
        return self

    @property
    def forced_tool(self) -> str | None:
        """The tool a named `tool_choice` names."""
        return self.tool_choice.function.name if isinstance(self.tool_choice, NamedToolChoice) else None

    @property
    def calling(self) -> Literal["none", "auto", "required"]:
        """Whether tools may, must or must not be called."""
        if not self.tools or self.tool_choice == "none":
            return "none"
        return "auto" if self.tool_choice in (None, "auto") else "required"

    @property
    def limit(self) -> int | None:
        """Most tokens of the answer, as asked."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens


class LoadAdapterBody(Body):
    """POST /v1/load_lora_adapter."""

    lora_name: str
    lora_path: str
    load_inplace: bool = False


class UnloadAdapterBody(Body):
    """POST /v1/unload_lora_adapter."""

    lora_name: str


class TokenizeBody(Body):
    """POST /tokenize: a prompt, or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    tools: list[Tool] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    return_token_strs: bool | None = False

    @model_validator(mode="after")
    def _one(self) -> TokenizeBody:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self


class DetokenizeBody(Body):
    """POST /detokenize."""

    model: str | None = None
    tokens: list[Annotated[int, Field(ge=0)]]


B = TypeVar("B", bound=Body)


def parse(body: type[B], data: Any) -> B:
    """Read a request.

    Raises:
        ApiError: 400 that names every wrong field and does not repeat what was sent.
    """
    try:
        return body.model_validate(data)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_context=False, include_input=False)
        lines = []
        for problem in problems[:10]:
            where = ".".join(str(part) for part in problem["loc"])
            said = problem["msg"].removeprefix("Value error, ")
            lines.append(f"{where}: {said}" if where else said)
        if len(problems) > 10:
            lines.append(f"... and {len(problems) - 10} more")
        param = ".".join(str(part) for part in problems[0]["loc"]) or None
        raise rejected("\n".join(lines), param) from None

"""OpenAI's requests, as far as they are served: a field is honoured, changes no answer, or is refused by its name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from winnowkv.files import shown

MOST_STOPS, MOST_TOP = 16, 20  # stop strings, and likeliest tokens of which log probabilities are given
MOST_CHOICES = 128
BUDGETS = "Kept fraction of the prompt, kept entries, or auto:0.95 for a policy whose losses were measured"
Asks = Callable[[Any], bool]  # whether a value of a field asks for what is not served


def not_in(*neutral: Any) -> Asks:
    """Whether a value is none of those that change nothing."""
    return lambda value: not any(value == one and type(value) in (type(one), int, float) for one in neutral)


TOOLS = "tools are not served: leave it out"
ZERO = "only 0 is served: leave it out"
# Fields of OpenAI's, or of other servers like it, that would change the answer: which values do, and the way out.
REFUSED: dict[str, tuple[Asks, str]] = {
    "frequency_penalty": (not_in(0), ZERO),
    "presence_penalty": (not_in(0), ZERO),
    "logit_bias": (not_in({}), "tokens are not biased: leave it out"),
    "best_of": (not_in(1), "every choice is returned: give n"),
    "stop_token_ids": (not_in([]), "give stop strings"),
    "repetition_penalty": (not_in(1), "only 1 is served: leave it out"),
    "min_p": (not_in(0), ZERO),
}
REFUSED_IN_CHAT = REFUSED | {
    "tools": (not_in([]), TOOLS),
    "tool_choice": (not_in("none", "auto"), TOOLS),
    "functions": (not_in([]), TOOLS),
    "function_call": (not_in("none", "auto"), TOOLS),
    "response_format": (not_in({"type": "text"}), "answers are plain text: leave it out"),
    "modalities": (not_in(["text"]), "answers are text: leave it out"),
    "audio": (not_in(), "answers are text: leave it out"),
    "reasoning_effort": (not_in("none"), "the model's template takes none: leave it out"),
    "verbosity": (not_in("medium"), "leave it out, and say it in the prompt"),
    "web_search_options": (not_in(), "nothing is looked up: leave it out"),
}
REFUSED_IN_COMPLETIONS = REFUSED | {
    "echo": (not_in(False), "the prompt is not repeated, since its log probabilities are not computed: leave it out"),
    "suffix": (not_in(""), "nothing can follow the answer: leave it out"),
}
REFUSED_IN_MESSAGES: Mapping[str, tuple[Asks, str]] = {
    "name": (not_in(), "the model's template takes no names of participants: leave it out"),
    "tool_calls": (not_in([]), TOOLS),
    "tool_call_id": (not_in(), TOOLS),
    "function_call": (not_in(), TOOLS),
    "audio": (not_in(), "messages are text: leave it out"),
    "refusal": (not_in(), "leave it out, and give content"),
    "annotations": (not_in([]), "messages are text: leave it out"),
}


def refuse(name: str, why: str) -> PydanticCustomError:
    """An error of our own about a field of the body."""
    return PydanticCustomError("refused", "{why}", {"why": why, "param": name})


def whole_characters(text: str) -> str:
    """The text; raises for halves of characters, which JSON can write and no tokenizer reads."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise PydanticCustomError("half_character", "holds half of a character (a lone surrogate)") from None
    return text


def whole_numbers(value: Any) -> Any:
    """8 for 8.0, which JSON Schema takes for an integer, as do clients that know one kind of number; also within lists."""
    if isinstance(value, list):
        return [whole_numbers(one) if isinstance(one, float | list) else one for one in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


Text = Annotated[str, AfterValidator(whole_characters)]


class Strict(BaseModel):
    """A part of a request: of the types that JSON has, without unknown fields; null is as good as left out."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
    refused: ClassVar[Mapping[str, tuple[Asks, str]]] = {}

    @model_validator(mode="before")
    @classmethod
    def without_refused(cls, body: Any) -> Any:
        """The body without fields that ask for nothing; raises for those that cannot be honoured."""
        if not isinstance(body, dict):
            return body
        kept = {}
        for name, value in body.items():
            if name in cls.refused:
                asks, why = cls.refused[name]
                if value is not None and asks(value):
                    raise refuse(name, f"{name}={shown(value)} is not served: {why}")
            elif value is not None or name not in cls.model_fields:
                whole = name in cls.model_fields and cls.model_fields[name].annotation in (int, int | None)
                kept[name] = whole_numbers(value) if whole else value
        return kept


class TextPart(Strict):
    """A part of a message's content. Images, sound and files are refused."""

    type: Literal["text"]
    text: Text


class ChatMessage(Strict):
    """A message; several text parts are joined by line ends. ``developer`` is ``system`` to the model's template."""

    refused = REFUSED_IN_MESSAGES
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[TextPart]

    @model_validator(mode="before")
    @classmethod
    def only_text(cls, body: Any) -> Any:
        """The body; raises for parts that are no text, and for messages of tools."""
        if not isinstance(body, dict):
            return body
        if body.get("role") in ("tool", "function"):
            raise refuse("messages", f"role {shown(body['role'])} is not served: {TOOLS}")
        parts = body.get("content")
        for part in parts if isinstance(parts, list) else []:
            if isinstance(part, dict) and isinstance(part.get("type"), str) and part["type"] != "text":
                raise refuse("messages", f"content of type {shown(part['type'])} is not served: the model reads text alone")
        return body

    @property
    def text(self) -> str:
        """The whole content."""
        return self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)


class StreamOptions(Strict):
    """Of a streamed answer. ``include_usage``: a last chunk with the usage. ``include_obfuscation`` changes no answer."""

    include_usage: bool = False
    include_obfuscation: bool | None = None


class WinnowOptions(Strict):
    """What is kept of the prompt of this request alone; what is left out is as the server was started.

    ``decode_budget``: most entries of generated tokens that are held per layer and KV head. ``explain``: return what was kept.
    """

    policy: str | None = Field(None, max_length=500, examples=["snapkv:observe=16"])
    budget: int | float | Annotated[str, Field(max_length=40)] | None = Field(None, examples=[0.12, 128], description=BUDGETS)
    quality: Literal["lean", "balanced", "best"] | None = None
    task: Literal["localization", "aggregation"] | None = None
    lookahead: int | None = Field(None, ge=0, le=4096, description="Tokens of the answer that are generated before a choice")
    draft: int | None = Field(None, ge=0, le=4096, description="Tokens generated from what would stay, then thrown away")
    decode_budget: int | None = Field(None, ge=1, le=2**31)
    explain: bool | None = None
    context: str | None = Field(None, max_length=200, description="The same as winnow_context")


class Common(Strict):
    """Fields of both kinds of requests.

    ``user``, ``metadata``, ``store``, ``service_tier`` and the like are accepted and change nothing.
    """

    model: str = Field(description="Name of the served model", examples=["embedded"])
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int = Field(1, ge=1, le=MOST_CHOICES)
    stop: Text | Annotated[list[Annotated[Text, Field(min_length=1)]], Field(max_length=MOST_STOPS)] | None = None
    seed: int | None = Field(None, ge=0, lt=2**62)
    temperature: float = Field(1.0, ge=0, le=2, description="0 takes the likeliest token; OpenAI's default is 1")
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1, le=2**31, description="Not OpenAI's: draw from so many tokens; 0 or -1 for all")
    min_tokens: int = Field(0, ge=0, le=2**31, description="Not OpenAI's: tokens before the answer may end")
    ignore_eos: bool = Field(False, description="Not OpenAI's: go on after end tokens")
    winnow: WinnowOptions | None = None
    winnow_context: str | None = Field(None, max_length=200, description="Id of a stored context that the prompt asks about")
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None

    @model_validator(mode="after")
    def options_of_streams(self) -> Common:
        """Itself; raises for stream options of an answer that is not streamed."""
        if self.stream_options is not None and not self.stream:
            raise refuse("stream_options", "stream_options are of streamed answers: leave them out, or give stream=true")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings; an empty one alone is none."""
        return tuple(filter(None, [self.stop])) if isinstance(self.stop, str) else tuple(self.stop or ())


class ChatRequest(Common):
    """``POST /v1/chat/completions``."""

    refused = REFUSED_IN_CHAT
    messages: list[ChatMessage] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1, le=2**31)
    max_completion_tokens: int | None = Field(None, ge=1, le=2**31, description="OpenAI's newer name of max_tokens")
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MOST_TOP)
    parallel_tool_calls: bool | None = None
    prediction: dict[str, Any] | None = None

    @model_validator(mode="after")
    def fields_agree(self) -> ChatRequest:
        """Itself; raises for fields that contradict each other."""
        if self.top_logprobs and not self.logprobs:
            raise refuse("top_logprobs", f"top_logprobs={self.top_logprobs} needs logprobs=true: give it, too")
        both = self.max_tokens, self.max_completion_tokens
        if None not in both and both[0] != both[1]:
            raise refuse("max_tokens", f"max_tokens={both[0]} contradicts max_completion_tokens={both[1]}: give one of them")
        return self

    @property
    def asked_tokens(self) -> int | None:
        """Most new tokens, if the request says."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def top(self) -> int | None:
        """Likeliest tokens of which log probabilities are asked for; None without any."""
        return (self.top_logprobs or 0) if self.logprobs else None


Tokens = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1)]
Prompt = Annotated[str, Field(min_length=1), AfterValidator(whole_characters)]
Texts = Annotated[list[Prompt], Field(min_length=1)]


class CompletionRequest(Common):
    """``POST /v1/completions``. Several prompts give ``n`` choices each, in their order."""

    refused = REFUSED_IN_COMPLETIONS
    prompt: Annotated[Prompt | Texts | Tokens | Annotated[list[Tokens], Field(min_length=1)], BeforeValidator(whole_numbers)]
    max_tokens: int = Field(16, ge=1, le=2**31)
    logprobs: int | None = Field(None, ge=0, le=MOST_TOP)

    @property
    def asked_tokens(self) -> int | None:
        """Most new tokens."""
        return self.max_tokens

    @property
    def top(self) -> int | None:
        """Likeliest tokens of which log probabilities are asked for; None without any."""
        return self.logprobs

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each prompt by itself."""
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)

"""Requests and answers as they cross the wire: OpenAI's chat completions and completions.

What this server does not do is refused by name, unless it is asked for in a way that changes nothing.
"""

from __future__ import annotations

import time
import uuid
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictStr,
    field_validator,
    model_validator,
)

from nirvana_deploy.serve.errors import Refused

_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalties": (),
    "function_call": ("none",),
    "functions": ([],),
    "guided_json": (),
    "logit_bias": ({},),
    "logprobs": (False,),
    "min_p": (0, 0.0),
    "modalities": (["text"],),
    "n": (1,),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "web_search_options": (),
}
"""Parameters of OpenAI's API that this server refuses, and the values that ask for nothing."""
_SETTINGS = ConfigDict(extra="forbid", allow_inf_nan=False)
_Number = Annotated[float, Field(strict=True)]
_StopText = Annotated[str, Field(strict=True, min_length=1, max_length=1000)]


def _same(value: Any, neutral: Any) -> bool:
    """Whether they are equal, and neither a number taken for a truth value: ``logprobs`` 0 asks for some."""
    return isinstance(value, bool) == isinstance(neutral, bool) and bool(value == neutral)


class StreamOptions(BaseModel):
    """What a stream holds beside text."""

    model_config = _SETTINGS
    include_usage: StrictBool | None = None
    include_obfuscation: StrictBool | None = None
    """Padding against guesses from the sizes of packets; there is none here."""
    continuous_usage_stats: StrictBool | None = None
    """Beyond OpenAI's API, as of vLLM: an event for every token, each with the counts so far."""


class Request(BaseModel):
    """What both kinds of requests say."""

    model_config = _SETTINGS
    model: StrictStr | None = None
    """The only model answers where none is named."""
    max_tokens: Annotated[int, Field(strict=True, ge=1, le=2**31 - 1)] | None = None
    temperature: Annotated[_Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[_Number, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(strict=True, ge=-1, le=2**31 - 1)] | None = None
    """Beyond OpenAI's API, as of other servers; 0 and -1 are no limit."""
    repetition_penalty: Annotated[_Number, Field(ge=0.1, le=10)] | None = None
    """Likewise."""
    ignore_eos: StrictBool | None = None
    """Likewise, as of vLLM: the model's stop tokens end no answer, which gets its full length."""
    presence_penalty: Annotated[_Number, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[_Number, Field(ge=-2, le=2)] | None = None
    seed: Annotated[int, Field(strict=True, ge=-(2**63), le=2**63 - 1)] | None = None
    stop: Annotated[list[_StopText], Field(max_length=16)] | None = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    user: StrictStr | None = None
    """Of whom an abuse would be told; changes no answer, and is not kept."""
    metadata: dict[str, Any] | None = None
    """Likewise."""

    @model_validator(mode="before")
    @classmethod
    def _known(cls, given: Any) -> Any:
        """Leave out what asks for nothing; raises Refused for what is not supported."""
        if not isinstance(given, dict):
            return given
        for name, neutral in _UNSUPPORTED.items():
            if (value := given.get(name)) is not None and not any(_same(value, one) for one in neutral):
                raise Refused(
                    400, f"{name!r} is not supported by this server.", param=name, code="unsupported"
                )
        return {name: value for name, value in given.items() if name not in _UNSUPPORTED}

    @field_validator("stop", mode="before")
    @classmethod
    def _listed(cls, given: Any) -> Any:
        """One text may stand alone."""
        return [given] if isinstance(given, str) else given

    @property
    def with_usage(self) -> bool:
        """Whether a stream ends with the counts of tokens."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def counts_each(self) -> bool:
        """Whether a stream has an event for every token, with the counts so far."""
        return bool(self.stream_options and self.stream_options.continuous_usage_stats)


class CompletionRequest(Request):
    """A text to be continued."""

    prompt: Any
    """A text, alone or as the one member of a list; or token ids."""

    @field_validator("prompt")
    @classmethod
    def _text_or_ids(cls, given: Any) -> str | list[int]:
        match given:
            case str():
                return given
            case [str() as text]:
                return text
            case [str(), *_]:
                raise Refused(400, "One prompt per request is supported.", param="prompt", code="unsupported")
            case [_, *_] if all(type(token) is int and token >= 0 for token in given):
                return list(given)
        raise ValueError("should be a text, a list with one text, or a list of token ids")


class TextPart(BaseModel):
    """A part of a message."""

    model_config = _SETTINGS
    type: Literal["text"]
    text: StrictStr


class Message(BaseModel):
    """A turn of a conversation."""

    model_config = _SETTINGS
    role: Literal["system", "developer", "user", "assistant"]
    content: list[TextPart]

    @model_validator(mode="before")
    @classmethod
    def _said(cls, given: Any) -> Any:
        """Leave out nulls, as of an answer that is sent back: no refusal, no tool calls, no audio."""
        if not isinstance(given, dict):
            return given
        return {name: value for name, value in given.items() if value is not None}

    @field_validator("content", mode="before")
    @classmethod
    def _parts(cls, given: Any) -> Any:
        """A text may stand alone."""
        return [{"type": "text", "text": given}] if isinstance(given, str) else given

    @property
    def turn(self) -> dict[str, str]:
        """As chat templates know it: developers speak as the system."""
        text = "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(Request):
    """A conversation to be answered."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(strict=True, ge=1, le=2**31 - 1)] | None = None


class Usage(BaseModel):
    """What an answer took."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Wire:
    """The objects of one answer, of a chat or a completion."""

    def __init__(self, model: str, *, chat: bool) -> None:
        self._chat = chat
        self._id = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        self._model, self._created = model, int(time.time())

    def whole(self, text: str, ending: str, usage: Usage) -> dict[str, Any]:
        """The answer in one piece."""
        said: dict[str, Any] = {"text": text}
        if self._chat:
            said = {"message": {"role": "assistant", "content": text, "refusal": None}}
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": ending}
        return {**self._head("chat.completion"), "choices": [choice], "usage": usage.model_dump()}

    def piece(
        self, text: str, *, first: bool = False, ending: str | None = None, usage: Usage | None = None
    ) -> dict[str, Any]:
        """A piece of a streamed answer; the last one says how it ended. ``usage``: the counts so far."""
        said: dict[str, Any] = {"text": text}
        if self._chat:
            role = {"role": "assistant"} if first else {}
            said = {"delta": {**role, **({"content": text} if text or first else {})}}
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": ending}
        counts = {} if usage is None else {"usage": usage.model_dump()}
        return {**self._head("chat.completion.chunk"), "choices": [choice], **counts}

    def counts(self, usage: Usage) -> dict[str, Any]:
        """The counts at the end of a stream."""
        return {**self._head("chat.completion.chunk"), "choices": [], "usage": usage.model_dump()}

    def _head(self, of_chat: str) -> dict[str, Any]:
        kind = of_chat if self._chat else "text_completion"
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model}

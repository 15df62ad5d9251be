"""Refusals as OpenAI's clients read them: a status and ``{"error": {message, type, param, code}}``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from nirvana_deploy.base.registry import nearest_names

_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
_LONGEST_VALUE = 60
_SUBJECT = re.compile(r"^(Input|String|List|Value error,) ")
"""How pydantic's sentences begin, where the parameter is named already."""


class Refused(HTTPException):
    """A request that gets no answer, with the reason."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, detail=message, headers=dict(headers or {}))
        self.param, self.code = param, code


def error_object(status: int, message: str, param: str | None = None, code: str | None = None) -> Any:
    """The body of a refusal."""
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def refusal(error: HTTPException) -> JSONResponse:
    """A refusal as a response."""
    param, code = (error.param, error.code) if isinstance(error, Refused) else (None, None)
    body = error_object(error.status_code, str(error.detail), param, code)
    return JSONResponse(body, error.status_code, headers=error.headers)


def fault() -> JSONResponse:
    """What is answered where the server itself fails."""
    return JSONResponse(error_object(500, "The server is at fault; its log says more."), 500)


def invalid(error: RequestValidationError, known: Mapping[str, list[str]]) -> Refused:
    """The first thing that is wrong with a body; ``known`` are the parameters of each route's body."""
    first = error.errors()[0]
    kind, where = str(first["type"]), [str(part) for part in first["loc"][1:]]
    name, context = ".".join(where), first.get("ctx") or {}
    if kind == "json_invalid":
        place = f" at character {first['loc'][1]}" if len(first["loc"]) > 1 else ""
        return Refused(400, f"The body is not JSON: {context.get('error', 'it cannot be read')}{place}.")
    if not where:
        return Refused(400, "The body must be a JSON object, sent as Content-Type: application/json.")
    if kind == "extra_forbidden":
        close = nearest_names(where[-1], known.get(name.rpartition(".")[0], []))
        guess = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
        return Refused(400, f"Unknown parameter: {name!r}.{guess}", param=name, code="unknown_parameter")
    if kind == "missing":
        return Refused(400, f"{name!r} is missing.", param=name, code="missing_required_parameter")
    said = _SUBJECT.sub("", str(first["msg"]))
    return Refused(400, f"{name!r}: {said}, got {_shown(first.get('input'))}.", param=name)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}..."

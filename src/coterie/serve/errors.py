"""Errors as vLLM says them: a status, and {"error": {"message", "type", "param", "code"}} as the body."""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from coterie.errors import CoterieError

BUSY = "The engine is currently busy and cannot accept new requests. Please try again later or on a different instance."
"""vLLM's words for a full queue."""


class ApiError(CoterieError):
    """A request is answered with an error status."""

    def __init__(
        self,
        status: int,
        message: str,
        kind: str,
        *,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """`kind`: the "type" of the body, such as "BadRequestError". `param`: the field that is wrong."""
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.param = param
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """The JSON body."""
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.status}}


def rejected(message: str, param: str | None = None) -> ApiError:
    """400: the request itself is wrong; asking again will not help."""
    return ApiError(HTTPStatus.BAD_REQUEST, message, "BadRequestError", param=param)


def unknown_model(model: str, base: str) -> ApiError:
    """404 on a model name."""
    return ApiError(
        HTTPStatus.NOT_FOUND,
        f"The model `{model}` does not exist. Valid aliases: {base}.",
        "NotFoundError",
        param="model",
    )


def busy(message: str = BUSY, *, retry_after_s: int = 1) -> ApiError:
    """503: full, or shutting down; another server or a later time will do."""
    return ApiError(
        HTTPStatus.SERVICE_UNAVAILABLE,
        message,
        HTTPStatus.SERVICE_UNAVAILABLE.phrase,
        headers={"Retry-After": str(retry_after_s)},
    )


def failed(message: str) -> ApiError:
    """500: the server's own fault."""
    return ApiError(HTTPStatus.INTERNAL_SERVER_ERROR, message, "InternalServerError")

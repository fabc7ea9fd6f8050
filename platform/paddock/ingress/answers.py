"""What answers have in common: the shape of an error, and the header that names an adapter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse

ADAPTER = "x-paddock-adapter"
"""The header of an answer that has the name of the adapter that gave it, percent-encoded."""
_KINDS = {
    401: "AuthenticationError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    429: "RateLimitError",
    503: "ServiceUnavailableError",
}


def error_response(path: str, status: int, message: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """The reference's shape for `/generate`, else OpenAI's. path: below the application's route prefix."""
    body: dict[str, Any]
    if path == "/generate":
        body = {"generated_text": "", "num_output_tokens_cf": 0, "error": message}
    else:
        kind = _KINDS.get(status, "BadRequestError" if status < 500 else "InternalServerError")
        body = {"error": {"message": message, "type": kind, "param": None, "code": status}}
    return JSONResponse(body, status_code=status, headers=headers)

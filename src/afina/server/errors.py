"""API errors in the form of OpenAI's API: {"error": {message, type, param, code}}."""

import math
from typing import Any

from fastapi import HTTPException
from fastapi.responses import JSONResponse

from afina.errors import AfinaError, BusyError

ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    409: "conflict_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_busy_error",
}


class APIError(HTTPException):
    """An error response with a status from 400 to 503.

    Args:
        param: The field of the request that is wrong.
        retry_after: Seconds after which another attempt may succeed.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(status, message)
        self.message, self.param, self.code, self.retry_after = message, param, code, retry_after
        # the header takes integer seconds
        self.headers = (
            {} if retry_after is None else {"retry-after": str(max(1, math.ceil(retry_after)))}
        )

    @property
    def body(self) -> dict[str, Any]:
        """The JSON body of the response."""
        kind = ERROR_TYPES.get(self.status_code, "invalid_request_error")
        return {
            "error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        }

    def response(self) -> JSONResponse:
        """Return the response."""
        return JSONResponse(self.body, self.status_code, self.headers)


def to_api_error(error: AfinaError, param: str | None = None) -> APIError:
    """Convert an error of afina: 503 for `BusyError`, else 400."""
    if isinstance(error, BusyError):
        return APIError(503, error.what, code="server_busy", retry_after=error.retry_after)
    parts = [error.what, error.why, error.hint and f"next: {error.hint}"]
    return APIError(400, "; ".join(part for part in parts if part), param)


def not_found(what: str, name: str) -> APIError:
    """Return a 404 error, equal for names that do not exist and names of other owners."""
    return APIError(404, f"{what} {name!r} does not exist", code=f"{what}_not_found")

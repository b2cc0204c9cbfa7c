"""API errors in the form of OpenAI's API: {"error": {message, type, param, code}}."""

import math
from typing import Any

from fastapi import HTTPException
from fastapi.responses import JSONResponse

from afina.errors import (
    AdapterError,
    AfinaError,
    AuditError,
    BusyError,
    DataError,
    SettingsError,
)

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
    507: "server_error",
}
RETRY_SECONDS = 10.0  # after a fault of the server, such as a full disk


class APIError(HTTPException):
    """An error response with a status from 400 to 599.

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
    """Convert an error of afina to a status by whose fault it is.

    Settings, rows, prompts and adapters that a request names are the caller's (400), a full queue
    is temporary (503), and everything else (disk, base, files of the server) is the server's (500).
    The hint of the server's own errors is for its operator, and not for the caller.
    """
    if isinstance(error, BusyError):
        return APIError(503, error.what, code="server_busy", retry_after=error.retry_after)
    if not isinstance(error, SettingsError | DataError | AdapterError | AuditError):
        return server_fault(error.what)
    parts = [error.what, error.why, error.hint and f"next: {error.hint}"]
    return APIError(400, "; ".join(part for part in parts if part), param)


def server_fault(what: str) -> APIError:
    """Return a 500 error for a fault of the server or its machine, worth another attempt."""
    message = f"the server failed: {what}; the cause is in its log"
    return APIError(500, message, code="server_error", retry_after=RETRY_SECONDS)


def not_found(what: str, name: str, param: str | None = None) -> APIError:
    """Return a 404 error, equal for names that do not exist and names of other owners."""
    return APIError(404, f"{what} {name[:200]!r} does not exist", param, f"{what}_not_found")

"""What a client is told when a request cannot be answered, in OpenAI's form and in Anthropic's.

Messages name the field and the remedy; they never repeat what the client sent.
"""

from typing import Any

RETRY_SECONDS = 2


class ApiError(Exception):
    """An answer other than 200. param: the field at fault, as a path ("messages.0.content").

    close: whether the connection ends with it.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
        close: bool = False,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.retry_after = retry_after
        self.close = close

    @property
    def kind(self) -> str:
        """The error's `type`, the same words in both dialects where both have them."""
        return {
            401: "authentication_error",
            403: "permission_error",
            404: "not_found_error",
            413: "request_too_large",
            429: "rate_limit_error",
        }.get(self.status, "invalid_request_error" if self.status < 500 else "api_error")

    @property
    def headers(self) -> dict[str, str]:
        headers = {}
        if self.retry_after is not None:
            headers["Retry-After"] = str(self.retry_after)
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        if self.close:
            headers["Connection"] = "close"
        return headers

    def form(self, path: str) -> dict[str, Any]:
        """The error in the dialect of the path that was asked for."""
        return self.anthropic() if path.startswith("/v1/messages") else self.openai()

    def openai(self) -> dict[str, Any]:
        """{"error": {message, type, param, code}}."""
        return {
            "error": {
                "message": self.message,
                "type": self.kind,
                "param": self.param,
                "code": self.code,
            }
        }

    def anthropic(self) -> dict[str, Any]:
        """{"type": "error", "error": {type, message}}."""
        return {"type": "error", "error": {"type": self.kind, "message": self.message}}


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(400, message, param=param, code=code)

"""SGLang's remote endpoint, for programs that declare branches."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from functools import cached_property
from http import HTTPStatus
from typing import Any

from sglang.lang.backend.runtime_endpoint import RuntimeEndpoint
from sglang.utils import http_request

from sglang_dynasor.errors import FieldError, RefusedError
from sglang_dynasor.frontend import seat
from sglang_dynasor.frontend.driver import DEFAULT_ROWS, Driver


class Endpoint(RuntimeEndpoint):
    """A server at an address, with or without our scheduler: `sgl.set_default_backend(Endpoint(url))`.

    Args:
        base_url: http://HOST:PORT of an SGLang server.
        rows: most requests at once of searches that run here.
        admin_api_key: the server's, if it has one: SGLang wants it of who ends a request, and `api_key` of all else.
        options: of SGLang's RuntimeEndpoint: api_key, verify, chat_template_name.
    """

    def __init__(self, base_url: str, *, rows: int = DEFAULT_ROWS, admin_api_key: str | None = None, **options: Any):
        super().__init__(base_url.rstrip("/"), **options)
        self.admin_api_key = admin_api_key
        self.driver = Driver(self, rows)

    @property
    def name(self) -> str:
        return f"the server at {self.base_url}"

    @property
    def has_scheduler(self) -> bool:
        return self._answers_status

    @cached_property
    def _answers_status(self) -> bool:
        return self._request("/dynasor/status").status_code == HTTPStatus.OK

    def _request(self, path: str, data: dict[str, Any] | None = None, api_key: str | None = None) -> Any:
        return http_request(self.base_url + path, json=data, api_key=api_key or self.api_key, verify=self.verify)

    def post(self, data: dict[str, Any]) -> dict[str, Any] | None:
        response = self._request("/generate", data)
        if response.status_code == HTTPStatus.OK:
            return response.json()
        if response.status_code == HTTPStatus.BAD_REQUEST:
            raise _refusal(response)
        return None

    def _assert_success(self, res: Any) -> None:
        """What SGLang calls for every request that an executor makes."""
        if res.status_code == HTTPStatus.BAD_REQUEST:
            raise _refusal(res)
        super()._assert_success(res)

    def tokenize(self, text: str) -> list[int]:
        return self._tokens({"prompt": text, "add_special_tokens": False})

    def render(self, messages: Sequence[Mapping[str, object]]) -> str:
        added = self._tokens({"prompt": ""})  # to every prompt: the server adds them to this one again
        tokens = self._tokens({"messages": [dict(message) for message in messages]})
        if added and tokens[: len(added)] == added:
            tokens = tokens[len(added) :]
        response = self._request("/detokenize", {"tokens": tokens, "skip_special_tokens": False})
        self._assert_success(response)
        return response.json()["text"]

    def _tokens(self, data: dict[str, Any]) -> list[int]:
        response = self._request("/tokenize", data)
        self._assert_success(response)
        return response.json()["tokens"]

    def abort(self, rid: str) -> None:
        response = self._request("/abort_request", {"rid": rid}, self.admin_api_key)
        if response.status_code != HTTPStatus.OK:
            raise RuntimeError(f"HTTP {response.status_code} from /abort_request")

    def close(self) -> None:
        """Let the threads of searches go."""
        self.driver.close()

    # The seam: SGLang calls this with the payload of every request that an executor makes.
    def _add_images(self, s: Any, data: dict[str, Any]) -> None:
        super()._add_images(s, data)
        seat.attach(s, data)

    def generate(self, s: Any, sampling_params: Any) -> seat.Said:
        return seat.generate(s, sampling_params, lambda: super(Endpoint, self).generate(s, sampling_params))

    def generate_stream(self, s: Any, sampling_params: Any) -> Generator[seat.Said, Any, None]:
        return seat.generate_stream(
            s, sampling_params, lambda: super(Endpoint, self).generate_stream(s, sampling_params)
        )


def _refusal(response: Any) -> FieldError:
    """The error that an HTTP 400 is."""
    answer = response.json()
    error = answer.get("error", answer) if isinstance(answer, dict) else answer
    message = str(error.get("message", error) if isinstance(error, dict) else error)
    return FieldError(message) if "dynasor" in message else RefusedError(message)

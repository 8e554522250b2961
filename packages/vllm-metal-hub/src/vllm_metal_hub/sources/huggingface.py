"""Hugging Face, through huggingface_hub's own session, listing and errors."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import huggingface_hub
import huggingface_hub.errors as hf_errors
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status  # type: ignore[attr-defined]

from vllm_metal_hub.errors import GatedError, HubError, NetworkError, NotFoundError
from vllm_metal_hub.settings import HUGGINGFACE, HubSettings, host_of
from vllm_metal_hub.snapshot import FileEntry
from vllm_metal_hub.sources.base import ByteStream, Listing, TransientError, seconds_of, start_of

T = TypeVar("T")
_RETRIED = (408, 425, 429, 500, 502, 503, 504)


class HuggingFace:
    """One endpoint of Hugging Face or of a mirror; a token goes to huggingface.co only, unless allowed."""

    def __init__(self, settings: HubSettings) -> None:
        self.endpoint = settings.hf_endpoint
        self._timeout_s = settings.timeout_s
        own = host_of(self.endpoint) == host_of(HUGGINGFACE) or settings.token_to_mirror
        self._token: str | bool = (huggingface_hub.get_token() or False) if own else False
        self._api = huggingface_hub.HfApi(endpoint=self.endpoint, token=self._token)
        _set_timeouts(settings.timeout_s)

    def commit(self, repo: str, revision: str | None) -> str:
        """One request."""

        def ask() -> str:
            return str(self._api.model_info(repo, revision=revision, timeout=self._timeout_s).sha)

        return self._translated(f"{repo}@{revision or 'main'}", ask)

    def list_files(self, repo: str, revision: str | None) -> Listing:
        """Two requests: the commit of ``revision``, then its tree (more for very many files)."""
        commit = self.commit(repo, revision)
        return self._translated(
            f"{repo}@{revision or 'main'}", lambda: Listing(commit, tuple(self._tree(repo, commit)))
        )

    def _tree(self, repo: str, commit: str) -> Iterator[FileEntry]:
        """The pages of a tree; the library's own call repeats each of them six times when the hub is down."""
        url = f"{self.endpoint}/api/models/{repo}/tree/{commit}?recursive=true"
        while url:
            page = get_session().get(url, headers=build_hf_headers(token=self._token))
            hf_raise_for_status(page)
            yield from (_entry(item) for item in page.json() if item["type"] == "file")
            url = page.links.get("next", {}).get("url", "")

    @contextmanager
    def open(self, repo: str, commit: str, path: str, start: int) -> Iterator[ByteStream]:
        """One GET, which follows the hub's redirect to its storage without the token."""
        url = huggingface_hub.hf_hub_url(repo, path, revision=commit, endpoint=self.endpoint)
        headers = build_hf_headers(token=self._token) | {"Accept-Encoding": "identity"}
        if start:
            headers["Range"] = f"bytes={start}-"
        what = f"{repo}/{path}"
        try:
            with get_session().stream("GET", url, headers=headers, follow_redirects=True) as response:
                self._translated(what, lambda: _raise_for_status(response))
                begin = start_of(response.status_code, response.headers.get("Content-Range"))
                yield ByteStream(begin, response.iter_raw())
        except _transport_error() as error:
            raise TransientError(f"{type(error).__name__}: {error}") from error

    def _translated(self, what: str, ask: Callable[[], T]) -> T:
        try:
            return ask()
        except hf_errors.GatedRepoError as error:
            raise GatedError(
                f"[pull] expected access to {what}, got a refusal: it is gated. Accept its licence at "
                f"{self.endpoint}/{what.split('@', maxsplit=1)[0]} and set HF_TOKEN."
            ) from error
        except (
            hf_errors.RepositoryNotFoundError, hf_errors.RevisionNotFoundError, hf_errors.RemoteEntryNotFoundError,
        ) as error:  # fmt: skip
            raise NotFoundError(
                f"[pull] expected {what} at {self.endpoint}, got: it does not exist there, or is private. "
                "Check the spelling, or set HF_TOKEN."
            ) from error
        except hf_errors.HfHubHTTPError as error:
            raise self._http_error(what, error) from error
        except (_transport_error(), hf_errors.LocalEntryNotFoundError, TimeoutError) as error:
            raise TransientError(f"{self.endpoint}: {type(error).__name__}: {error}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise NetworkError(
                f"[pull] expected the Hugging Face API at {self.endpoint}, got something else ({error}). "
                "Check HF_ENDPOINT, and that no login page stands in between."
            ) from error

    def _http_error(self, what: str, error: Any) -> Exception:
        status = error.response.status_code
        if status in _RETRIED:
            return TransientError(
                f"{self.endpoint}: status {status}", seconds_of(error.response.headers.get("Retry-After"))
            )
        if status == 404:
            return NotFoundError(
                f"[pull] expected {what} at {self.endpoint}, got: it does not exist there. Check the spelling, and "
                "HF_ENDPOINT where it is set."
            )
        if status in (401, 403):
            return GatedError(f"[pull] expected access to {what}, got status {status}. Set a valid HF_TOKEN.")
        return NetworkError(f"[pull] expected {what} from {self.endpoint}, got status {status}. Try again later.")


def _entry(item: Any) -> FileEntry:
    if item.get("lfs"):
        return FileEntry(item["path"], item["lfs"]["size"], f"sha256:{item['lfs']['oid']}")
    return FileEntry(item["path"], item["size"], f"git-sha1:{item['oid']}")


def _raise_for_status(response: Any) -> None:
    if response.status_code >= 400:
        response.read()
    if response.status_code == 416:
        raise HubError("[pull] expected a shorter partial file, got one longer than the hub's. Remove it.")
    hf_raise_for_status(response)


def _transport_error() -> type[Exception]:
    """The base of connection errors of the HTTP library that huggingface_hub was built on."""
    client_module = type(get_session()).__module__.split(".")[0]
    error: type[Exception] = __import__(client_module).TransportError
    return error


def _set_timeouts(timeout_s: float) -> None:
    """Give every request of huggingface_hub a time limit: its own client has none."""

    def factory() -> Any:
        from huggingface_hub.utils._http import default_client_factory

        client = default_client_factory()
        client.timeout = timeout_s
        return client

    huggingface_hub.set_client_factory(factory)
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

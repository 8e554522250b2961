"""ModelScope, through modelscope_hub's own listing, download stream and errors."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import modelscope_hub
import modelscope_hub.errors as ms_errors
import requests
import urllib3

from vllm_metal_hub.errors import GatedError, NetworkError, NotFoundError
from vllm_metal_hub.settings import HubSettings, is_modelscope
from vllm_metal_hub.snapshot import FileEntry
from vllm_metal_hub.sources.base import ByteStream, Listing, TransientError, seconds_of, start_of

T = TypeVar("T")
DEFAULT_BRANCH = "master"


class ModelScope:
    """One endpoint of ModelScope; a token goes to ModelScope's own domains only, unless allowed."""

    def __init__(self, settings: HubSettings) -> None:
        self.endpoint = settings.modelscope_endpoint
        own = is_modelscope(self.endpoint) or settings.token_to_mirror
        token = os.environ.get("MODELSCOPE_API_TOKEN") if own else ""
        self._client = modelscope_hub.HubApi(endpoint=self.endpoint, token=token).legacy

    def commit(self, repo: str, revision: str | None) -> None:
        """Nothing: branches there are named by their content only, which takes the listing."""

    def list_files(self, repo: str, revision: str | None) -> Listing:
        """One request; the library repeats it on errors of the server."""
        branch = branch_of(revision)
        try:
            raw = self._translated(
                f"{repo}@{branch}",
                lambda: self._client.list_repo_files(repo, "model", revision=branch, recursive=True),
            )
        except TransientError as error:  # the library has tried as often as we would
            raise NetworkError(
                f"[pull] expected the file list of {repo}, got {error}. Check the network, or try another source."
            ) from error
        files = tuple(
            FileEntry(
                item["Path"], int(item.get("Size") or 0), f"sha256:{item['Sha256']}" if item.get("Sha256") else ""
            )
            for item in raw
            if item.get("Type") != "tree"
        )
        return Listing(branch, files)

    @contextmanager
    def open(self, repo: str, commit: str, path: str, start: int) -> Iterator[ByteStream]:
        """One GET, which follows the redirect to the object store."""
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
        response = self._translated(
            f"{repo}/{path}",
            lambda: self._client.download_stream(repo, "model", path, revision=commit, headers=headers),
        )
        try:
            begin = start_of(response.status_code, response.headers.get("Content-Range"))
            yield ByteStream(begin, response.iter_content(1 << 16))
        except (requests.RequestException, urllib3.exceptions.HTTPError, OSError) as error:
            if isinstance(error, OSError) and not isinstance(error, requests.RequestException | ConnectionError):
                raise
            raise TransientError(f"{type(error).__name__}: {error}") from error
        finally:
            response.close()

    def _translated(self, what: str, ask: Callable[[], T]) -> T:
        try:
            return ask()
        except (ms_errors.AuthenticationError, ms_errors.PermissionDeniedError) as error:
            raise GatedError(
                f"[pull] expected access to {what}, got a refusal by {self.endpoint}. Accept its licence there and "
                "set MODELSCOPE_API_TOKEN."
            ) from error
        except ms_errors.NotExistError as error:
            raise NotFoundError(
                f"[pull] expected {what} at {self.endpoint}, got: it does not exist there, or is private. "
                "Check the spelling; revisions there are branches and tags, the default is master."
            ) from error
        except (ms_errors.RateLimitError, ms_errors.ServerError, ms_errors.NetworkError) as error:
            after = getattr(error, "retry_after", None)
            said = str(error).splitlines()[0]
            raise TransientError(f"{self.endpoint}: {said}", float(after) if after is not None else None) from error
        except ms_errors.APIError as error:
            raise NetworkError(
                f"[pull] expected {what} from {self.endpoint}, got {error}. Try again later."
            ) from error
        except requests.HTTPError as error:
            after_text = error.response.headers.get("Retry-After") if error.response is not None else None
            raise TransientError(f"{self.endpoint}: {error}", seconds_of(after_text)) from error
        except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
            raise TransientError(f"{self.endpoint}: {type(error).__name__}: {error}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise NetworkError(
                f"[pull] expected the ModelScope API at {self.endpoint}, got something else ({error!r}). "
                "Check MODELSCOPE_ENDPOINT, and that no login page stands in between."
            ) from error


def branch_of(revision: str | None) -> str:
    """ModelScope's word for a revision: its default branch is ``master``, which others call ``main``."""
    return DEFAULT_BRANCH if revision in (None, "main", "master") else str(revision)

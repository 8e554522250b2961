"""What the fetching process is asked for, as one line of JSON."""

import json
from dataclasses import dataclass

from vllm_metal_hub.model_ref import Source


@dataclass(frozen=True)
class Request:
    """What the parent asks for: a pull, or only what the hub has now (``only_list``).

    ``known_commit`` is what the parent has: a hub that can name its commit in one small request is asked no more.
    ``same_weights`` are the digests that the weights must have, when the model was pulled from another hub before.
    ``adopt`` are directories that may hold copies of the files.
    """

    ref: str
    source: Source
    revision: str | None = None
    only_list: bool = False
    known_commit: str = ""
    small: bool = False
    same_weights: tuple[str, ...] = ()
    adopt: tuple[str, ...] = ()


def request_line(request: Request) -> str:
    """The request as the process reads it."""
    return json.dumps(request.__dict__) + "\n"


def read_request(line: str) -> Request:
    """The request of a line that ``request_line`` wrote."""
    content = json.loads(line)
    return Request(**{**content, "same_weights": tuple(content["same_weights"]), "adopt": tuple(content["adopt"])})

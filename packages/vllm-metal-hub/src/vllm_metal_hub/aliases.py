"""Models that one hub has under another name than the user types: a table that the user keeps."""

import tomllib
from dataclasses import dataclass
from typing import get_args

from vllm_metal_hub.errors import UsageError
from vllm_metal_hub.model_ref import Source, parse
from vllm_metal_hub.settings import HubSettings


@dataclass(frozen=True)
class Aliases:
    """By hub: the repository there, by the name that is typed."""

    tables: dict[str, dict[str, str]]

    def name_at(self, source: Source, repo: str) -> str:
        """The repository that ``repo`` is at ``source``: itself unless the table says otherwise."""
        return self.tables.get(source, {}).get(repo, repo)


def read_aliases(settings: HubSettings) -> Aliases:
    """Read the table: a TOML file with a section for each hub, ``"typed/name" = "name/there"``; none is empty.

    Raises:
        UsageError: the file is something else, or the variable names no file.
    """
    path = settings.aliases
    if not path.exists() and not settings.aliases_chosen:
        return Aliases({})
    try:
        tables = tomllib.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"[aliases] expected a TOML file at {path}, got {error}. Correct it.") from error
    for hub, table in tables.items():
        if hub not in get_args(Source) or not isinstance(table, dict):
            raise UsageError(f"[aliases] expected [huggingface] and [modelscope] in {path}, got {hub!r}. Correct it.")
        for name, there in table.items():
            if not isinstance(there, str) or parse(there).repo != there:
                raise UsageError(f"[aliases] expected owner/name for {name!r} in {path}, got {there!r}. Correct it.")
    return Aliases(tables)

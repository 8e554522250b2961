"""Which flags of ``vllm serve`` a family of models wants, and why: data in recipes.toml."""

import json
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Flag:
    """One recommended flag; ``value`` is None for a switch."""

    flag: str
    value: str | None
    why: str

    @property
    def words(self) -> list[str]:
        """As it is passed on a command line."""
        return [self.flag] if self.value is None else [self.flag, self.value]


def flags_for(model_type: str) -> tuple[str, tuple[Flag, ...]]:
    """The name of a model's recipe ("" for none) and its flags, those for every model included."""
    content = tomllib.loads(resources.files("vllm_metal_hub").joinpath("recipes.toml").read_text())
    found: dict[str, Any] = next(
        (r for r in content["recipe"] if model_type in r["model_types"]), {"name": "", "flags": []}
    )
    rows: list[dict[str, Any]] = [*content["always"], *found["flags"]]
    name: str = found["name"]
    return name, tuple(Flag(row["flag"], row.get("value"), row["why"]) for row in rows)


def template_flags(path: Path, flags: Sequence[Flag]) -> tuple[Flag, ...]:
    """The chat template that a recipe with tools needs, where the model's own knows none: one that comes with it.

    Nothing when no tools are recommended, when the model's template handles them, or when there is no other.
    """
    if not any(flag.flag == "--tool-call-parser" for flag in flags) or not path.is_dir():
        return ()
    if any("tools" in text for text in _own_templates(path)):
        return ()
    for candidate in sorted(path.rglob("*.jinja")):
        if candidate.name != "chat_template.jinja" and "tools" in candidate.read_text(errors="replace"):
            return (
                Flag("--chat-template", str(candidate), "the model's own template does not know tools; this does"),
            )
    return ()


def _own_templates(path: Path) -> list[str]:
    """The templates that a tokenizer takes by itself, as text."""
    found = [file.read_text(errors="replace") for file in (path / "chat_template.jinja",) if file.is_file()]
    for name in ("chat_template.json", "tokenizer_config.json"):
        try:
            template = json.loads((path / name).read_text()).get("chat_template")
        except (OSError, ValueError, AttributeError):
            continue
        found += [json.dumps(template)] if template else []
    return found


def value_of(flag: str, given: Sequence[str]) -> str | None:
    """What the user passes for ``flag``: after it, or after ``=``; "" for a switch, None where it is not passed."""
    for word, after in zip(given, (*given[1:], ""), strict=False):
        name, equals, value = word.partition("=")
        if word.startswith("-") and _plain(name) == _plain(flag):
            return value if equals else after
    return None


def without_given(flags: Sequence[Flag], given: Sequence[str]) -> tuple[Flag, ...]:
    """Leave out what the user passes: as ``--flag``, ``--flag=value``, ``--no-flag`` or with underscores."""
    names = {_plain(word.split("=")[0]) for word in given if word.startswith("-")}
    return tuple(flag for flag in flags if _plain(flag.flag) not in names)


def _plain(flag: str) -> str:
    return flag.replace("_", "-").removeprefix("--").removeprefix("no-")


def model_type_of(path: Path) -> str:
    """The ``model_type`` in a snapshot's config.json; empty where there is none, as beside a GGUF file."""
    try:
        config = json.loads(((path if path.is_dir() else path.parent) / "config.json").read_text())
    except (OSError, ValueError):
        return ""
    return str(config.get("model_type") or "")

"""``vllm-metal doctor``: everything that has to be right on this machine, one line each, with what to do."""

import dataclasses
import json
import sys
from collections.abc import Callable, Iterable, Iterator

from rich.console import Console
from rich.markup import escape

from vllm_metal_hub.doctor_checks import (
    Check,
    cache_checks,
    environment_checks,
    mlx_checks,
    system_checks,
    vllm_checks,
)
from vllm_metal_hub.doctor_hubs import hub_checks

_MARKS = {"ok": "[green]✓[/]", "warn": "[yellow]![/]", "fail": "[red]✗[/]"}
_GROUPS: tuple[tuple[str, Callable[[], Iterable[Check]]], ...] = (
    ("This machine", system_checks),
    ("MLX", mlx_checks),
    ("vLLM", vllm_checks),
    ("Environment", environment_checks),
    ("Caches", cache_checks),
    ("Hubs", hub_checks),
)


def run_doctor(as_json: bool, console: Console | None = None) -> int:
    """Print every check; return 1 if any failed, else 0."""
    if as_json:
        groups = {title: list(checks()) for title, checks in _GROUPS}
        every = [check for checks in groups.values() for check in checks]
        lines = [{"group": title, **dataclasses.asdict(c)} for title, checks in groups.items() for c in checks]
        json.dump({"ok": not _failed(every), "checks": lines}, sys.stdout, indent=2, ensure_ascii=False)
        print()
        return int(_failed(every))
    return _print(console or Console(highlight=False))


def _print(console: Console) -> int:
    every: list[Check] = []
    for title, checks in _GROUPS:
        console.print(f"[bold]{title}[/]")
        for check in _with_status(console, title, checks):
            every.append(check)
            console.print(f"  {_MARKS[check.status]} {check.name}: {escape(check.found)}", soft_wrap=True)
            if check.advice and check.status != "ok":
                console.print(f"    → {escape(check.advice)}", soft_wrap=True)
    warnings = sum(check.status == "warn" for check in every)
    failures = sum(check.status == "fail" for check in every)
    verdict = "[red]Not ready[/]" if failures else "[green]Ready[/]"
    console.print(f"\n{verdict}: {failures} failed, {warnings} to look at, {len(every)} checks.")
    return int(bool(failures))


def _with_status(console: Console, title: str, checks: Callable[[], Iterable[Check]]) -> Iterator[Check]:
    with console.status(f"{title} …"):
        found = list(checks())
    yield from found


def _failed(checks: Iterable[Check]) -> bool:
    return any(check.status == "fail" for check in checks)

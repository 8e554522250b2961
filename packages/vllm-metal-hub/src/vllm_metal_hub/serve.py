"""``vllm-metal serve``: resolve, plan, recommend, show, then become ``vllm serve``."""

import argparse
import json
import os
import shlex
import sys
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.markup import escape

from vllm_metal_hub import planning
from vllm_metal_hub.commands import pull_snapshot
from vllm_metal_hub.errors import HubError
from vllm_metal_hub.model_ref import parse
from vllm_metal_hub.planning import Plan
from vllm_metal_hub.recipes import Flag, flags_for, model_type_of, template_flags, value_of, without_given
from vllm_metal_hub.server_process import vllm_command


def serve(options: argparse.Namespace) -> int:
    """Replace this process by ``vllm serve`` with the recommended flags; with --dry-run or --json, only show them."""
    console = Console(stderr=True, highlight=False)
    given = [word for word in options.flags if word != "--"]
    snapshot = pull_snapshot(options.ref, options)
    name, flags = flags_for(model_type_of(snapshot.path))
    added = without_given((*flags, *template_flags(snapshot.path, flags)), given)
    command = [*vllm_command(), "serve", str(snapshot.path)]
    ref = parse(options.ref)
    if ref.path is None and value_of("--served-model-name", given) is None:
        command += ["--served-model-name", ref.label]
    command += [*(word for flag in added for word in flag.words), *given]
    plan = _plan(str(snapshot.path), ref.label, given, console)
    if options.json:
        print(json.dumps(_as_json(plan, name, added, command), indent=2))
        return 0
    if plan is not None:
        console.print(planning.table(plan))
    if options.explain:
        console.print(f"[bold]{escape(name or 'No recipe for this family')}[/]")
        for flag in added:
            console.print(f"  {escape(' '.join(flag.words))}  [dim]{escape(flag.why)}[/]", soft_wrap=True)
    print(shlex.join(command), file=sys.stderr, flush=True)
    if not options.dry_run:
        os.execvp(command[0], command)
    return 0


def _plan(path: str, name: str, given: list[str], console: Console) -> Plan | None:
    """The plan for what the user passes; a model that cannot be planned is left to vLLM's own message."""
    try:
        found = planning.make_plan(path, name=name, fraction=_fraction(given))
    except HubError as error:
        console.print(f"No plan: {escape(str(error))}", soft_wrap=True)
        return None
    if not found.fits:
        console.print(f"[yellow]{escape(planning.no_room(found))}[/]", soft_wrap=True)
    return found


def _fraction(given: list[str]) -> float | None:
    try:
        return float(value_of("--gpu-memory-utilization", given) or "")
    except ValueError:
        return None


def _as_json(plan: Plan | None, name: str, added: tuple[Flag, ...], command: list[str]) -> dict[str, Any]:
    return {
        "plan": planning.as_json(plan) if plan else None, "recipe": name, "flags": [asdict(flag) for flag in added],
        "command": command,
    }  # fmt: skip

"""``vllm-metal serve``: resolve, recommend, show, then become ``vllm serve``."""

import argparse
import os
import shlex
import sys

from rich.console import Console
from rich.markup import escape

from vllm_metal_hub.commands import pull_snapshot
from vllm_metal_hub.model_ref import parse
from vllm_metal_hub.recipes import flags_for, model_type_of, without_given
from vllm_metal_hub.server_process import vllm_command


def serve(options: argparse.Namespace) -> int:
    """Replace this process by ``vllm serve`` with the recommended flags; with --dry-run, only show them."""
    console = Console(stderr=True, highlight=False)
    given = [word for word in options.flags if word != "--"]
    snapshot = pull_snapshot(options.ref, options)
    name, flags = flags_for(model_type_of(snapshot.path))
    added = without_given(flags, given)
    command = [*vllm_command(), "serve", str(snapshot.path)]
    ref = parse(options.ref)
    if ref.path is None and not names_the_model(given):
        command += ["--served-model-name", ref.label]
    command += [word for flag in added for word in flag.words]
    if options.explain:
        console.print(f"[bold]{escape(name or 'No recipe for this family')}[/]")
        for flag in added:
            console.print(f"  {escape(' '.join(flag.words))}  [dim]{escape(flag.why)}[/]", soft_wrap=True)
    command += given
    print(shlex.join(command), file=sys.stderr, flush=True)
    if not options.dry_run:
        os.execvp(command[0], command)
    return 0


def names_the_model(given: list[str]) -> bool:
    """Tell whether the user names the model themself."""
    return any(word.split("=")[0].replace("_", "-") == "--served-model-name" for word in given)

"""The commands about models on this machine: pull, list, path, verify, rm, export, import, exec."""

import argparse
import dataclasses
import json
import os
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from vllm_metal_hub import archive, store
from vllm_metal_hub.errors import IntegrityError, NotFoundError, UsageError
from vllm_metal_hub.manifest import SMALL
from vllm_metal_hub.model_ref import Source, is_local, parse
from vllm_metal_hub.pull_display import PullDisplay
from vllm_metal_hub.resolver import resolve
from vllm_metal_hub.settings import HubSettings, parse_sources
from vllm_metal_hub.sizes import bytes_text
from vllm_metal_hub.snapshot import LocalSnapshot


def pull(options: argparse.Namespace) -> int:
    """Fetch a snapshot, or find it here, and say where it is."""
    snapshot = pull_snapshot(options.ref, options)
    return _say(options, _as_json(snapshot), str(snapshot.path))


def _say(options: argparse.Namespace, content: Any, text: str) -> int:
    """The result of a command: JSON for scripts, text for people."""
    if options.json:
        json.dump(content, sys.stdout, indent=2, default=str)
        print()
    elif text:
        print(text)
    return 0


def pull_snapshot(text: str, options: argparse.Namespace) -> LocalSnapshot:
    """Resolve with progress on the error stream; standard output stays for scripts."""
    console = Console(stderr=True, highlight=False)
    sources: tuple[Source, ...] | None = parse_sources(options.source) if options.source else None
    with PullDisplay(console, text) as display:
        return resolve(
            text, revision=options.revision, sources=sources, offline=True if options.offline else None,
            update="always" if options.update else None, on_event=display,
        )  # fmt: skip


def path(options: argparse.Namespace) -> int:
    """Print the path of a model that is on this machine; never use the network."""
    snapshot = resolve(options.ref, revision=options.revision, offline=True)
    return _say(options, _as_json(snapshot), str(snapshot.path))


def list_models(options: argparse.Namespace) -> int:
    """Show every snapshot on this machine."""
    found = store.installed()
    if options.json or options.names:
        names = dict.fromkeys(item.name for item in found if item.manifest.selection != SMALL)
        return _say(options, [_installed_json(item) for item in found], "\n".join(names))
    table = Table(box=None, header_style="bold")
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 1000  # paths in one piece, for grep and cut
    for title in ("model", "from", "size", "checked", "where"):
        table.add_column(title, justify="right" if title == "size" else "left", overflow="fold")
    for item in found:
        m = item.manifest
        table.add_row(item.name, m.source, bytes_text(item.nbytes), m.check, str(m.directory))
    if found:
        console.print(table)
    else:
        print("No models yet. Get one with: vllm-metal pull owner/name")
    return 0


def verify(options: argparse.Namespace) -> int:
    """Compare snapshots with what was pulled, byte for byte; --repair fetches what differs."""
    items = store.find(options.ref, options.revision) if options.ref else store.installed()
    bad: dict[str, dict[str, str]] = {}
    for item in items:
        wrong = store.verify(item, full=not options.quick)
        if wrong and options.repair:
            options.source, options.offline, options.update = item.manifest.source, False, False
            pull_snapshot(item.name, options)
            wrong = store.verify(store.find(item.name)[0])
        if wrong:
            bad[item.name] = wrong
        if not options.json:
            print(f"{item.name}: {'damaged' if wrong else 'ok'} ({bytes_text(item.nbytes)})")
    if options.json:
        _say(options, {"ok": not bad, "problems": bad}, "")
    if bad:
        name, wrong = next(iter(bad.items()))
        file, what = next(iter(wrong.items()))
        raise IntegrityError(f"[verify] expected {file} of {name} as pulled, got: {what}. Run with --repair.")
    return 0


def remove(options: argparse.Namespace) -> int:
    """Remove a model from this machine."""
    freed: Counter[str] = Counter()
    for item in store.find(options.ref, options.revision, also_small=True):
        freed[item.name] += store.remove(item)
    lines = [f"removed {name}: {bytes_text(count)}" for name, count in freed.items()]
    return _say(options, {"removed": freed}, "\n".join(lines))


def export(options: argparse.Namespace) -> int:
    """Write one archive for machines without network."""
    target = Path(options.archive)
    item = store.find(options.ref, options.revision)[0]
    archive.export_snapshot(item, target)
    nbytes = target.stat().st_size
    return _say(options, {"archive": target, "bytes": nbytes, "model": item.name}, f"{target}: {bytes_text(nbytes)}")


def import_model(options: argparse.Namespace) -> int:
    """Take in an archive of `export`, or give a local directory a hub's name."""
    source, settings = Path(options.what).expanduser(), HubSettings.from_env()
    if options.name:
        found = archive.import_directory(source, parse(options.name), settings)
    elif source.is_dir():
        raise UsageError(f"[import] expected --as owner/name for the directory {source}, got none. Add it.")
    else:
        found = archive.import_archive(source, settings)
    return _say(options, _as_json(found.snapshot()), f"{found.repo}: {found.directory}")


def execute(options: argparse.Namespace) -> int:
    """Run a command in which every model id is a local path, resolved here and now; does not return."""
    words = options.words[1:] if options.words[:1] == ["--"] else options.words
    if not words or shutil.which(words[0]) is None:
        raise UsageError(f"[exec] expected a command that exists, got {' '.join(words) or 'none'}. Write it after --.")
    arguments = [words[0], *(_resolved_word(word, options) for word in words[1:])]
    sys.stdout.flush()
    os.environ.update({"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"})
    os.execvp(arguments[0], arguments)


def _resolved_word(word: str, options: argparse.Namespace) -> str:
    """Replace ``owner/name`` and ``hf://``, ``ms://`` references, also after ``--flag=``; leave the rest."""
    flag, equals, value = word.rpartition("=") if word.startswith("--") and "=" in word else ("", "", word)
    marked = value.startswith(("hf://", "ms://"))
    if not marked and (is_local(value) or value.count("/") != 1 or value.startswith("-")):
        return word
    try:
        return f"{flag}{equals}{pull_snapshot(value, options).path}"
    except (UsageError, NotFoundError):
        if marked:
            raise
        return word


def _as_json(snapshot: LocalSnapshot) -> dict[str, Any]:
    return {**dataclasses.asdict(snapshot), "path": str(snapshot.path)}


def _installed_json(item: store.Installed) -> dict[str, Any]:
    m = item.manifest
    return {
        "model": item.name, "source": m.source, "endpoint": m.endpoint, "revision": m.revision, "commit": m.commit,
        "bytes": item.nbytes, "check": m.check, "path": str(m.snapshot().path),
    }  # fmt: skip

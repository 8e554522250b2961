"""``vllm-metal plan``: what a model would take of this machine, before its weights are fetched."""

import argparse
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from vllm_metal_hub.errors import HubError, UsageError
from vllm_metal_hub.events import OnEvent, silent
from vllm_metal_hub.file_selection import is_weight
from vllm_metal_hub.model_ref import parse
from vllm_metal_hub.pull_display import PullDisplay
from vllm_metal_hub.resolver import list_files, resolve
from vllm_metal_hub.settings import HubSettings
from vllm_metal_hub.sizes import bytes_text
from vllm_metal_hub.snapshot import LocalSnapshot

BLOCK_SIZE = 16
STEP_BYTES = 1_000_000_000
"""Assumed for one step's activations; the server measures it when it starts."""


@dataclass(frozen=True)
class Plan:
    """Figures in bytes and tokens; ``context`` is the longest single request, at most what the model was made for."""

    model: str
    fetch_bytes: int
    free_disk_bytes: int
    weight_bytes: int
    usable_memory_bytes: int
    kv_cache_bytes: int
    kv_cache_tokens: int
    context: int
    trained_context: int

    @property
    def fits(self) -> bool:
        """Tell whether the model can be served at all."""
        return self.context > 0


def plan(options: argparse.Namespace) -> int:
    """Show the plan; exit code 1 when the model does not fit."""
    console = Console(highlight=False)
    with PullDisplay(Console(stderr=True, highlight=False), options.ref) as display:
        found = make_plan(options.ref, options.revision, on_event=display)
    if options.json:
        print(json.dumps(as_json(found), indent=2))
    else:
        console.print(table(found))
    if not found.fits:
        raise HubError(no_room(found))
    return 0


def no_room(found: Plan) -> str:
    """What to tell someone whose model does not fit."""
    return (
        f"[plan] expected room for the cache of one request to {found.model}, got "
        f"{bytes_text(max(found.kv_cache_bytes, 0))}. "
        "Choose a smaller or more quantized model, or raise VLLM_METAL_MEMORY_FRACTION."
    )


def as_json(found: Plan) -> dict[str, Any]:
    """For scripts."""
    return {**asdict(found), "fits": found.fits}


def make_plan(
    text: str,
    revision: str | None = None,
    *,
    name: str | None = None,
    fraction: float | None = None,
    on_event: OnEvent = silent,
) -> Plan:
    """Read the configuration, fetched alone if it has to be, and divide this machine's memory.

    ``fraction`` of the memory is the server's; None is what it takes by itself. ``name`` is what the plan calls it.

    Raises:
        UsageError: a GGUF reference that is not on this machine: its configuration is inside the file.
        HubError: the model cannot be found, or its architecture is not supported.
    """
    settings = HubSettings.from_env()
    small = resolve(text, revision=revision, profile="small", on_event=on_event)
    config_path = _configuration(small.path)
    if config_path is None:
        raise UsageError(f"[plan] expected a model with a config.json, got {text}. Pull it first: vllm-metal pull.")
    weights, fetch = _weight_bytes(text, revision, small, on_event)
    return _divide(name or parse(text).label, json.loads(config_path.read_text()), weights, fetch, settings, fraction)


def _configuration(path: Path) -> Path | None:
    """The config.json of a snapshot: for a GGUF file, the one that is written out of it."""
    if path.is_file() or (not (path / "config.json").is_file() and any(path.glob("*.gguf"))):
        from vllm_metal_plugin.errors import ModelFilesError
        from vllm_metal_plugin.model_path import resolve as open_gguf

        try:
            path = Path(open_gguf(str(path)))
        except ModelFilesError as error:
            raise HubError(str(error)) from error
    return path / "config.json" if (path / "config.json").is_file() else None


def _weight_bytes(text: str, revision: str | None, small: LocalSnapshot, on_event: OnEvent) -> tuple[int, int]:
    """Bytes of the weights, and how many would have to be fetched."""
    if small.path.is_file():
        names = {entry.path for entry in small.files if is_weight(entry.path)} or {small.path.name}
        return sum((small.path.parent / Path(name).name).stat().st_size for name in names), 0
    here = sum(path.stat().st_size for kind in ("safetensors", "gguf") for path in small.path.glob(f"*.{kind}"))
    if here or small.source == "local":
        return here, 0
    sizes = sum(entry.size for entry in small.files if not is_weight(entry.path))
    listed = list_files(text, revision=revision, on_event=on_event)["bytes"]
    return int(listed) - sizes, int(listed)


def _divide(
    name: str, config: dict[str, Any], weights: int, fetch: int, settings: HubSettings, fraction: float | None
) -> Plan:
    from metal_kv.budget import MemoryBudget
    from metal_models import MetalModelsError, PagedModel
    from metal_models.registry import build
    from vllm_metal_plugin import device, memory
    from vllm_metal_plugin.envs import read_envs

    try:
        specs = PagedModel(build(config), config).kv_cache_specs(BLOCK_SIZE)
    except MetalModelsError as error:
        raise HubError(str(error)) from error
    envs = read_envs()
    target = device.select_device(envs)
    on_cpu = target == "cpu"
    budget = MemoryBudget.plan(
        device.free_memory_bytes() if on_cpu else device.total_memory_bytes(target),
        envs.memory_fraction or fraction or (memory.CPU_FRACTION if on_cpu else memory.DEFAULT_FRACTION),
        model_memory=weights, overhead=STEP_BYTES, block_size=BLOCK_SIZE,
        per_block_bytes=sum(spec.page_size_bytes for spec in specs.values()),
        kv_budget_limit=memory.CPU_KV_CACHE_BYTES if on_cpu and (envs.memory_fraction or fraction) is None else None,
    )  # fmt: skip
    trained = int(config.get("max_position_embeddings") or 0)
    return Plan(
        name, fetch, shutil.disk_usage(_existing(settings.hf_cache)).free, weights, budget.usable, budget.kv_budget,
        budget.max_tokens_cached, budget.max_model_len(trained or budget.max_tokens_cached), trained,
    )  # fmt: skip


def _existing(path: Path) -> Path:
    while not os.path.exists(path):
        path = path.parent
    return path


def table(found: Plan) -> Table:
    """For people."""
    rows = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    rows.add_column(style="dim")
    rows.add_column()
    rows.add_row("model", found.model)
    rows.add_row("to fetch", f"{bytes_text(found.fetch_bytes)} ({bytes_text(found.free_disk_bytes)} free)")
    rows.add_row("memory to use", bytes_text(found.usable_memory_bytes))
    rows.add_row("weights", bytes_text(found.weight_bytes))
    rows.add_row("one step", f"{bytes_text(STEP_BYTES)} assumed; measured at start")
    rows.add_row("KV cache", f"{bytes_text(max(found.kv_cache_bytes, 0))}: {found.kv_cache_tokens:,} tokens")
    trained = f" of the {found.trained_context:,} it was trained for" if found.trained_context else ""
    rows.add_row("context", f"{found.context:,} tokens{trained}")
    return rows

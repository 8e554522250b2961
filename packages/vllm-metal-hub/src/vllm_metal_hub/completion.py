"""``vllm-metal completion``: what a shell needs to complete commands, flags and the models on this machine."""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

SHELLS = ("bash", "zsh", "fish")
_PROGRAM = "vllm-metal"
_MODELS = f"{_PROGRAM} list --names 2>/dev/null"


@dataclass(frozen=True)
class _Flag:
    word: str
    text: str
    takes_value: bool


@dataclass(frozen=True)
class _Command:
    """One command as a shell sees it."""

    name: str
    text: str
    flags: tuple[_Flag, ...]
    takes_model: bool
    choices: tuple[str, ...]


def script(shell: str, parser: argparse.ArgumentParser) -> str:
    """The completion script of one of ``SHELLS``, for the commands of ``parser``."""
    commands = tuple(_commands(parser))
    return {"bash": _bash, "zsh": _zsh, "fish": _fish}[shell](commands)


def _commands(parser: argparse.ArgumentParser) -> Iterator[_Command]:
    for action in parser._actions:  # noqa: SLF001 - argparse has no public way to list them
        if not isinstance(action, argparse._SubParsersAction):  # noqa: SLF001
            continue
        texts = {choice.dest: choice.help or "" for choice in action._choices_actions}  # noqa: SLF001
        for name, command in action.choices.items():
            yield _command(name, texts.get(name, ""), command)


def _command(name: str, text: str, parser: argparse.ArgumentParser) -> _Command:
    actions = parser._actions  # noqa: SLF001
    flags = tuple(
        _Flag(word, action.help or "", action.nargs != 0)
        for action in actions
        for word in action.option_strings
        if word.startswith("--")
    )
    positional = [a for a in actions if not a.option_strings]
    choices = tuple(str(choice) for a in positional for choice in a.choices or ())
    return _Command(name, text, flags, any(a.dest == "ref" for a in positional), choices)


def _bash(commands: tuple[_Command, ...]) -> str:
    words = {c.name: " ".join([*(f.word for f in c.flags), *c.choices]) for c in commands}
    cases = "\n".join(f'        {c.name}) words="{words[c.name]}"; models={int(c.takes_model)} ;;' for c in commands)
    return f"""# bash completion of {_PROGRAM}
_vllm_metal() {{
    local current="${{COMP_WORDS[COMP_CWORD]}}" words models=0
    COMPREPLY=()
    if ((COMP_CWORD == 1)); then
        COMPREPLY=($(compgen -W "{" ".join(c.name for c in commands)} --help --version" -- "$current"))
        return
    fi
    case "${{COMP_WORDS[1]}}" in
{cases}
        *) return ;;
    esac
    if [[ $current != -* ]]; then
        ((models)) && words="$words $({_MODELS})"
        COMPREPLY=($(compgen -f -- "$current"))
    fi
    COMPREPLY+=($(compgen -W "$words" -- "$current"))
    # A colon ends a word for readline: give back what comes after it.
    declare -F __ltrim_colon_completions >/dev/null && __ltrim_colon_completions "$current"
}}
complete -o filenames -F _vllm_metal {_PROGRAM}
"""


def _zsh(commands: tuple[_Command, ...]) -> str:
    described = "\n".join(f"        {_quoted(f'{c.name}:{c.text}')}" for c in commands)
    cases = "\n".join(_zsh_case(c) for c in commands)
    return f"""#compdef {_PROGRAM}
# zsh completion of {_PROGRAM}
_vllm_metal() {{
    local -a commands
    commands=(
{described}
    )
    if ((CURRENT == 2)); then
        _describe command commands
        return
    fi
    case "$words[2]" in
{cases}
    esac
}}
_vllm_metal_models() {{
    local -a models
    models=(${{(f)"$({_MODELS})"}})
    compadd -a models
    _files
}}
compdef _vllm_metal {_PROGRAM}
"""


def _zsh_case(command: _Command) -> str:
    specs = [_quoted(f"{f.word}[{_plain(f.text)}]{':value:' * f.takes_value}") for f in command.flags]
    if command.choices:
        specs.append(_quoted(f"1:word:({' '.join(command.choices)})"))
    rest = "_vllm_metal_models" if command.takes_model else "_files"
    lines = " ".join([*specs, _quoted(f"*::word:{rest}")])
    return f"        {command.name}) shift words; ((CURRENT--)); _arguments {lines} ;;"


def _fish(commands: tuple[_Command, ...]) -> str:
    lines = [f"# fish completion of {_PROGRAM}"]
    for c in commands:
        lines.append(f"complete -c {_PROGRAM} -n __fish_use_subcommand -f -a {c.name} -d {_quoted(c.text)}")
        here = f"complete -c {_PROGRAM} -n '__fish_seen_subcommand_from {c.name}'"
        lines += [
            f"{here} -l {f.word.removeprefix('--')}{' -r' * f.takes_value} -d {_quoted(f.text)}" for f in c.flags
        ]
        if c.choices:
            lines.append(f"{here} -f -a {_quoted(' '.join(c.choices))}")
        if c.takes_model:
            lines.append(f"{here} -a '({_MODELS})'")
    return "\n".join(lines) + "\n"


def _plain(text: str) -> str:
    """Without what zsh's specifications give a meaning to."""
    return text.replace("[", "(").replace("]", ")").replace(":", ",")


def _quoted(text: str) -> str:
    """In single quotes, for all three shells."""
    return "'" + text.replace("'", "’") + "'"

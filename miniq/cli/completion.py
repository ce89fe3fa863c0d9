# SPDX-License-Identifier: MIT
"""``miniq completion``: a script with which a shell completes commands and options, made from the parser."""

from __future__ import annotations

import argparse
from typing import Any, Callable, Dict, List, Tuple

EPILOG = """\
A shell completes the words of a program of one name, so this is for the command `miniq` (or another
one with --name, say of an alias for python -m miniq).

examples:
  eval "$(miniq completion bash)"                                          in ~/.bashrc
  miniq completion zsh > ~/.zfunc/_miniq                                   a folder of $fpath
  miniq completion fish > ~/.config/fish/completions/miniq.fish
  alias mq='python -m miniq'; eval "$(mq completion bash --name mq)"
"""
#: Options whose value is the name of a file.
_FILES = frozenset("--workdir --logfile -f --pidfile --health-file --executable".split())


def add_parser(subparsers: Any) -> None:
    """Add the command to the command line; the parser of all commands comes as an option, `whole_parser`."""
    mine = subparsers.add_parser(
        "completion", help="print a script for completion in bash, zsh or fish", epilog=EPILOG,
        description="Print a script with which a shell completes commands and options.",
    )  # fmt: skip
    mine.set_defaults(run=run, needs_app=False)
    mine.add_argument("shell", choices=sorted(SCRIPTS))
    mine.add_argument("--name", default="miniq", help="name of the command (default miniq)")


def run(app: Any, options: argparse.Namespace) -> int:
    """Print the script."""
    print(SCRIPTS[options.shell](options.name, *words_of(options.whole_parser)), end="")
    return 0


#: An option or word, and its help.
Word = Tuple[str, str]


def words_of(parser: argparse.ArgumentParser) -> Tuple[List[Word], Dict[str, Tuple[str, List[Word]]]]:
    """Return the program's options, and {command: (help, its options and choices)}."""
    commands: Dict[str, Tuple[str, List[Word]]] = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            helps = {one.dest: one.help or "" for one in action._choices_actions}
            for name, sub in sorted(action.choices.items()):
                commands[name] = (_plain(helps.get(name, "")), _options(sub))
    return [word for word in _options(parser) if word[0] not in commands], commands


def _options(parser: argparse.ArgumentParser) -> List[Word]:
    # A command that reads its words itself tells them by a default.
    found: List[Word] = [(word, "") for word in parser.get_default("completed_words") or ()]
    for action in parser._actions:
        if action.help == argparse.SUPPRESS:
            continue
        told = _plain(action.help or "")
        if action.option_strings:
            found += [(option, told) for option in action.option_strings]
        elif action.choices is not None:
            found += [(str(choice), told) for choice in action.choices]
    return found


def _plain(text: str) -> str:
    """Return a help text without what would end a quoted word in one of the shells."""
    text = text.replace("%%", "%")
    return "".join(" " if char in "'\"\\`$:[]\n" else char for char in text)


def _join(words: List[Word]) -> str:
    return " ".join(word for word, _ in words)


def _function(name: str) -> str:
    return "_" + "".join(char if char.isalnum() else "_" for char in name)


def bash(name: str, options: List[Word], commands: Dict[str, Tuple[str, List[Word]]]) -> str:
    """Return the script for bash."""
    cases = "\n".join(f"        {key}) words='{_join(words)}' ;;" for key, (_, words) in commands.items())
    alternatives = "|".join(sorted(_FILES))
    return f"""\
{_function(name)}() {{
    local current=${{COMP_WORDS[COMP_CWORD]}} previous=${{COMP_WORDS[COMP_CWORD-1]}} command= word words
    for word in "${{COMP_WORDS[@]:1:COMP_CWORD-1}}"; do
        case $word in
        {"|".join(commands)}) command=$word; break ;;
        esac
    done
    case $previous in
        {alternatives}) COMPREPLY=( $(compgen -f -- "$current") ); return ;;
    esac
    case $command in
{cases}
        *) words='{_join(options)} {" ".join(commands)}' ;;
    esac
    COMPREPLY=( $(compgen -W "$words" -- "$current") )
}}
complete -o default -F {_function(name)} {name}
"""


def zsh(name: str, options: List[Word], commands: Dict[str, Tuple[str, List[Word]]]) -> str:
    """Return the script for zsh."""

    def described(words: List[Word]) -> str:
        return " ".join(f"'{word}:{told}'" for word, told in words)

    cases = "\n".join(f"    {key}) found=({described(words)}) ;;" for key, (_, words) in commands.items())
    own = described([*options, *((key, told) for key, (told, _) in commands.items())])
    return f"""\
#compdef {name}
{_function(name)}() {{
  local -a found; local command= word
  for word in ${{words[2,CURRENT-1]}}; do
    case $word in
    {"|".join(commands)}) command=$word; break ;;
    esac
  done
  case $command in
{cases}
    *) found=({own}) ;;
  esac
  _describe '{name}' found
  _files
}}
compdef {_function(name)} {name}
"""


def fish(name: str, options: List[Word], commands: Dict[str, Tuple[str, List[Word]]]) -> str:
    """Return the script for fish."""

    def line(condition: str, word: str, told: str) -> str:
        if word.startswith("--"):
            flag = f"-l {word[2:]}" + (" -r" if word in _FILES else "")
        elif word.startswith("-") and len(word) == 2:
            flag = f"-s {word[1:]}"
        else:
            flag = f"-a {word}"
        return f"complete -c {name} -n '{condition}' {flag} -d '{told}'"

    none = "__fish_use_subcommand"
    lines = [line(none, word, told) for word, told in options]
    for key, (told, words) in commands.items():
        lines.append(line(none, key, told))
        lines += [line(f"__fish_seen_subcommand_from {key}", word, told) for word, told in words]
    return "\n".join(lines) + "\n"


#: Shell -> what makes its script.
SCRIPTS: Dict[str, Callable[[str, List[Word], Dict[str, Tuple[str, List[Word]]]], str]] = {
    "bash": bash,
    "fish": fish,
    "zsh": zsh,
}

# SPDX-License-Identifier: MIT
"""``miniq upgrade settings FILE``: rewrites the settings' names of Celery 3 as those of today.

What is replaced are names and the texts that are one (keys of a dict), found by Python's own tokenizer:
comments, and whatever else the file says, stay as they are.
"""

from __future__ import annotations

import argparse
import ast
import io
import os
import sys
import tokenize
from typing import Any, Dict, List, Tuple

from ..conf import CELERY_ONLY, OWN_SETTINGS, SETTINGS, old_name
from ..exceptions import MiniqError

EPILOG = """\
The file is kept as FILE.orig.  Without a flag the names become those of a settings module
(broker_url); with --django, or --compat, those with the prefix CELERY_ (CELERY_BROKER_URL), to be read
with config_from_object("django.conf:settings", namespace="CELERY").

exit codes:
  0  done, or nothing to do    1  the file cannot be read or written    2  wrong command line

examples:
  python -m miniq upgrade settings celeryconfig.py
  python -m miniq upgrade settings proj/settings.py --django
"""


def add_parser(subparsers: Any) -> None:
    """Add the command to the command line."""
    parser = subparsers.add_parser(
        "upgrade", help="rewrite a file of settings with today's names", epilog=EPILOG,
        description="Rewrite a file of settings: names of Celery before 4.0 become those of today.",
    )  # fmt: skip
    parser.set_defaults(run=run, needs_app=False)
    add = parser.add_argument
    add("what", choices=("settings",))
    add("file", metavar="FILE", help="the Python file")
    add("--django", action="store_true", help="upper case, with the prefix CELERY_")
    add("--compat", action="store_true", help="the same: old names with other prefixes get CELERY_")
    add("--no-backup", action="store_true", help="do not keep FILE.orig")


def run(app: Any, options: argparse.Namespace) -> int:
    """Rewrite the file."""
    path = options.file
    try:
        with tokenize.open(path) as file:
            source, encoding = file.read(), file.encoding
        text, changes = rewritten(source, options.django or options.compat)
        if not changes:
            print(f"{path}: nothing to change")
            return 0
        if not options.no_backup:
            _write(f"{path}.orig", source, encoding)
        _write(path, text, encoding)
    except OSError as error:
        raise MiniqError(f"{path}: {error.strerror}") from None
    except (SyntaxError, tokenize.TokenError, UnicodeDecodeError) as error:
        raise MiniqError(f"{path} is not Python: {error}") from None
    for old, new in sorted(changes.items()):
        print(f"{old} -> {new}", file=sys.stderr)
    print(f"{path}: {len(changes)} names changed")
    return 0


def _write(path: str, text: str, encoding: str) -> None:
    beside = f"{path}.new"
    with open(beside, "w", encoding=encoding, newline="") as file:
        file.write(text)
    os.replace(beside, path)


def rewritten(source: str, with_prefix: bool) -> Tuple[str, Dict[str, str]]:
    """Return the text with today's names, and {old: new} of those that were changed."""
    new_names = {
        old_name(name): f"CELERY_{name.upper()}" if with_prefix else name
        for name in (*sorted(CELERY_ONLY), *SETTINGS)
        if name not in OWN_SETTINGS
    }
    lines = source.splitlines(keepends=True)
    places: List[Tuple[int, int, int, str]] = []
    changes: Dict[str, str] = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        name, quote = token.string, ""
        if token.type == tokenize.STRING and name[0] in "'\"" and name[:3] not in ("'''", '\"\"\"'):
            name, quote = str(ast.literal_eval(name)), name[0]
        elif token.type != tokenize.NAME:
            continue
        new = new_names.get(name, name)
        if new != name:
            changes[name] = new
            places.append((token.start[0] - 1, token.start[1], token.end[1], f"{quote}{new}{quote}"))
    for row, start, end, text in reversed(places):
        lines[row] = lines[row][:start] + text + lines[row][end:]
    return "".join(lines), changes

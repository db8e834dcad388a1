"""A page for each command of trifuse: its usage and its options, as its parser has them."""

from __future__ import annotations

import argparse
from html import escape

from trifuse.architectures.cli.arguments import commands_below
from trifuse.architectures.cli.main import build_parser

WIDTH = 88  # of a usage line, in characters


def pages() -> dict[str, str]:
    """Return the page of each command."""
    named = [(parser.prog.split()[1:], parser) for parser in commands_below(build_parser())]
    return {f"commands/{words[0]}.md": page(parser) for words, parser in named if len(words) == 1}


def page(parser: argparse.ArgumentParser) -> str:
    """Return the page of a command, with a section for each command below it."""
    below = [each for each in commands_below(parser) if not commands_below(each)]
    sections = [section(each, f"## {each.prog}") for each in below] or [section(parser, "")]
    return "\n\n".join([f"# {parser.prog}", *sections]) + "\n"


def section(parser: argparse.ArgumentParser, heading: str) -> str:
    """Return what a command's ``--help`` says, its options in a table for each group."""
    formatter = parser.formatter_class(prog=parser.prog, width=WIDTH)
    formatter.add_usage(parser.usage, parser._actions, parser._mutually_exclusive_groups, prefix="")
    parts = [heading, parser.description or "", f"```text\n{formatter.format_help().strip()}\n```"]
    for group in parser._action_groups:
        rows = [row(formatter, action) for action in group._group_actions if action.help != argparse.SUPPRESS]
        if rows:
            table = [f"| {group.title} | meaning |", "| --- | --- |", *rows]
            parts += [group.description or "", "\n".join(table)]
    return "\n\n".join(filter(None, parts))


def row(formatter: argparse.HelpFormatter, action: argparse.Action) -> str:
    """Return the row of an argument: how it is written, and what it means."""
    default = action.dest.upper() if action.option_strings else action.dest
    values = formatter._format_args(action, default) if action.nargs != 0 else ""
    written = [f"{option} {values}".strip() for option in action.option_strings] or [values]
    said = " ".join(formatter._expand_help(action).split()) if action.help else ""
    code = ", ".join(f"`{one.replace(',', ', ')}`" for one in written)  # choices may then stand below each other
    return f"| {code} | {escape(said, quote=False).replace('|', '&#124;')} |"

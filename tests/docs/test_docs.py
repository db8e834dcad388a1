"""What README.md and docs/ show works: examples run, commands parse, links lead somewhere, tables are up to date."""

from __future__ import annotations

import argparse
import inspect
import json
import re
import shlex
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from written_pages import FENCE, PAGES, README, ROOT, TEXTS, fenced, inline, shell_lines

from trifuse import blocks, kernels
from trifuse.architectures.cli.bench import part_names
from trifuse.architectures.cli.main import build_parser
from trifuse.architectures.data.layouts import LAYOUTS
from trifuse.architectures.runs.recipes import RecipeError, recipe_from
from trifuse.architectures.runs.registry import experiments
from trifuse.benchmarks.reporting.tables import with_results
from trifuse.kernels import testing

RESULTS = ROOT / "benchmarks" / "results"
LONGEST_README = 8192
NO_GPU = "**No GPU figures yet:**"
PLANS = {"README.md": "## Repository layout", "docs/house.md": "## Folders and files"}
FOLDERS = ("kernels", "blocks", "architectures", "benchmarks", "hub", "website", "tests", "docs")
OF_OTHER_TOOLS = {"--nproc-per-node", "--tests", "--commit"}  # torchrun's, and those of benchmarks/reporting/report.py


def command_of(line: str) -> list[str] | None:
    """Return the arguments that a shell line gives to the trifuse command, None if it runs something else."""
    words = shlex.split(line, comments=True)
    module = "trifuse.architectures.cli"
    if words[:1] == ["trifuse"]:
        return words[1:]
    return words[words.index(module) + 1 :] if module in words else None


def leaf_parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """Yield the parser of every command that can be run."""
    nested = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    for action in nested:
        for child in action.choices.values():
            yield from leaf_parsers(child)
    if not nested:
        yield parser


EXAMPLES = [  # those that begin with a docstring are whole files, see test_house.py and tests/hub
    (name, code) for name, code in fenced("python") if not code.startswith('"""')
]
LINES = [(name, line) for name, text in TEXTS.items() for line in shell_lines(text)]
COMMANDS = [(name, arguments) for name, line in LINES if (arguments := command_of(line)) is not None]
PARSERS = {parser.prog: parser for parser in leaf_parsers(build_parser())}
FLAGS = {  # of each command, without the aliases that older scripts use
    prog: {next(flag for flag in action.option_strings if flag.startswith("--")) for action in options}
    for prog, parser in PARSERS.items()
    if (options := [action for action in parser._actions if action.option_strings])
}
OF_ALL_COMMANDS = {"--help", "--traceback"}
SECTIONS: dict[str, str] = dict(
    re.findall(r"^### (.+?)\n(.*?)(?=^##|\Z)", TEXTS["docs/command_line.md"], flags=re.MULTILINE | re.DOTALL)
)
every_page = pytest.mark.parametrize("page", PAGES)


# --------------------------------------------------------------------------------------------- examples and commands


def test_there_are_three_examples_and_some_commands():
    assert len(EXAMPLES) >= 3
    assert len(COMMANDS) >= 8
    assert len([code for name, code in EXAMPLES if name == "README.md"]) == 2


@pytest.mark.parametrize(
    ("page", "code"), EXAMPLES, ids=[f"{name}: {code.splitlines()[-1][:40]}" for name, code in EXAMPLES]
)
def test_example_runs(page, code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, page, "exec"), {"__name__": "example"})


@pytest.mark.parametrize(
    ("page", "arguments"), COMMANDS, ids=[f"{name}: {' '.join(words[:2])}" for name, words in COMMANDS]
)
def test_command_parses(page, arguments):
    assert build_parser().parse_args(arguments).run


def test_commands_use_no_aliases():
    used = {word for _, arguments in COMMANDS for word in arguments if word.startswith("--")}
    assert used <= set().union(*FLAGS.values())


@every_page
def test_named_commands_exist(page):
    """Commands within sentences may leave out their arguments; the words and the options that are there must exist."""
    for code in inline(TEXTS[page]):
        if code.startswith("trifuse ") and "COMMAND" not in code:
            options = {word for word in code.split() if word.startswith("--")}
            named = parsers_of([word for word in code.split() if word not in options])
            assert named, code
            assert options <= set().union(*(FLAGS[prog] for prog in named)), code


def parsers_of(words: list[str]) -> list[str]:
    """Return the command that these words begin with, or all commands of the group that they name."""
    exact = [prog for prog in PARSERS if prog.split() == words[: len(prog.split())]]
    return exact or [prog for prog in PARSERS if prog.split()[: len(words)] == words]


@every_page
def test_named_options_exist(page):
    named = {code.split()[0] for code in inline(TEXTS[page]) if code.startswith("--")}
    assert named <= set().union(OF_OTHER_TOOLS, *FLAGS.values())


@pytest.mark.parametrize("prog", PARSERS)
def test_every_option_is_described(prog):
    """A command's section and the shared sections that it points to name all of its options, and no others."""
    own = section_of(prog)
    shared = [section for name, section in SECTIONS.items() if f"(#{slug(name)})" in own]
    described, there = set().union(*map(options_in, (own, *shared))), FLAGS[prog] - OF_ALL_COMMANDS
    where = f"docs/command_line.md, section '{prog}' and the shared sections that it links to"
    assert there - described == set(), f"{where}: add these options"
    assert described - there == set(), f"{where}: the command lacks these options; remove them"


@pytest.mark.parametrize("prog", PARSERS)
def test_every_section_begins_with_what_the_command_needs(prog):
    """The lines of code at its beginning show the positional arguments, in order, and the required options."""
    begin = re.match(r"\n```sh\n(.*?)^```$", section_of(prog), flags=re.MULTILINE | re.DOTALL)
    lines = [line.split() for line in begin[1].splitlines()] if begin else []
    usages = [words[len(prog.split()) :] for words in lines if words[: len(prog.split())] == prog.split()]
    assert usages, f"docs/command_line.md, section '{prog}': begin with a usage line: {prog} ... in a block of sh"
    parser = PARSERS[prog]
    positional = [action for action in parser._actions if not action.option_strings and action.nargs not in ("?", "*")]
    required = {action.option_strings[0] for action in parser._actions if action.option_strings and action.required}
    either = [x for group in parser._mutually_exclusive_groups if group.required for x in group._group_actions]
    for words in usages:
        options = {word for word in words if word.startswith("--")}
        names = [word.lower() for word, before in zip(words, ["", *words], strict=False) if "--" not in word + before]
        one_of = {word for action in either for word in action.option_strings}
        assert options - one_of == required, f"{prog}: expected the required options in its usage line"
        known = [str(action.metavar or action.dest) for action in (positional or either[:1])]
        assert list(dict.fromkeys(names)) == ([] if options & one_of else known), f"{prog}: positional arguments"


def section_of(prog: str) -> str:
    """Return the section of a command, or of the group that it belongs to, on the page of the command line."""
    name = prog if prog in SECTIONS else prog.rpartition(" ")[0]
    assert name in SECTIONS, f"docs/command_line.md: add a section '### {prog}' that names the command's options"
    return SECTIONS[name]


def test_every_part_of_bench_is_described():
    described = set(inline(section_of("trifuse bench")))
    assert {*part_names(), *kernels.OPERATORS} - described == set(), "docs/command_line.md, 'trifuse bench': add these"


@every_page
def test_settings_name_fields_of_a_recipe(page):
    known = experiments()
    recipes = [one.load(what.recipe) for one in known for what in (one, *one.pretrainings)]
    for setting in re.findall(r"--set '?([\w.]+=[^\s'`]+)", TEXTS[page]):
        if setting != "FIELD=VALUE":
            assert any(accepts(recipe, setting) for recipe in recipes), setting


def accepts(recipe: type, setting: str) -> bool:
    """Tell whether a recipe has the field that is set, and takes the value."""
    try:
        return bool(recipe_from(recipe, given={"data.root": "cohort"}, settings=[setting]))
    except RecipeError:
        return False


def options_in(section: str) -> set[str]:
    """Return the options that a section names."""
    return {code.split()[0] for code in inline(section) if code.startswith("--")}


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    shown = [line for _, line in LINES] + [code for text in TEXTS.values() for code in inline(text)]
    named = {match[1] for line in shown if (match := re.match(r"make ([a-z-]+)", line))}
    assert {"demo", "test", "test-all", "bench", "kernels", "lint", "mutants"} <= named <= targets


def test_every_make_target_has_its_row():
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"^\.PHONY: (.+)$", text, flags=re.MULTILINE)[0].split()
    table = TEXTS["docs/house.md"].split("## Commands of make")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `make ([a-z-]+)` \|(.+)\|(.+)\|(.+)\|$", table, flags=re.MULTILINE)
    assert sorted(row[0] for row in rows) == sorted(targets), (
        "docs/house.md, 'Commands of make': one row for each target"
    )
    assert all(cell.strip() for row in rows for cell in row)


@every_page
def test_named_modules_exist(page):
    named = re.findall(r"-m (trifuse[\w.]+)", TEXTS[page])
    assert [name for name in named if find_spec(name) is None] == []


@every_page
def test_named_files_exist(page):
    """Paths below the repository's folders, in shell blocks and in sentences; <name> stands for any name."""
    pieces = [word for line in shell_lines(TEXTS[page]) for word in line.split()] + inline(TEXTS[page])
    paths = {
        path for piece in pieces for path in re.findall(rf"(?:^|(?<=\s))(?:{'|'.join(FOLDERS)})/[\w/.<>*-]*", piece)
    }
    assert [path for path in sorted(paths) if not any(ROOT.glob(re.sub(r"<[^>]+>", "*", path)))] == []


# ------------------------------------------------------------------------------------------------------- the README


def test_readme_fits():
    assert README.stat().st_size <= LONGEST_README


def test_readme_says_whether_a_gpu_was_measured():
    """One line on the first screen says that no GPU figure exists, as long as none does, and no longer."""
    none_measured = not any(is_of_a_gpu(path) for path in RESULTS.glob("*.json"))
    first_screen = "\n".join(TEXTS["README.md"].splitlines()[:20])
    assert first_screen.count(NO_GPU) == TEXTS["README.md"].count(NO_GPU) == none_measured
    assert TEXTS["docs/benchmarks.md"].count(NO_GPU) == none_measured


def is_of_a_gpu(path: Path) -> bool:
    """Tell whether a result file was measured on a GPU, by its name or by its stamp."""
    kind = path.name.split(".")[-2]
    return kind in ("cuda", "hip") or bool(json.loads(path.read_text(encoding="utf-8")).get("stamp", {}).get("driver"))


def test_readme_has_one_table_of_ten_rows():
    (table,) = re.findall(r"(?:^\|.*\n)+", TEXTS["README.md"], flags=re.MULTILINE)
    assert len(table.splitlines()) == 2 + 10
    assert re.findall(r"<!-- (\w+): ", TEXTS["README.md"]) == ["highlights"]


def test_readme_counts_the_rows_in_which_trifuse_is_behind():
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in TEXTS["README.md"].splitlines()
        if line[:3] == "| `"
    ]
    behind = [row for row in rows if row[3] and float(row[3]) < float(row[4])]
    assert f'In {len(behind)} of the {len(rows)} rows "best other" is faster than trifuse' in TEXTS["README.md"]
    slower = [float(row[6]) < 1 for row in rows]
    assert slower == [*[False] * (len(rows) - 1), True], "README.md, above the table: say in which rows it is slower"


# -------------------------------------------------------------------------------------------------- links and tables


def slug(heading: str) -> str:
    """Return the anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def links(page: str) -> Iterator[tuple[Path, str]]:
    """Yield the file and the anchor of every relative link of a page."""
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", TEXTS[page])):
        if not re.match(r"[a-z]+:", target):
            file, _, anchor = target.partition("#")
            yield (PAGES[page].parent / file).resolve() if file else PAGES[page], anchor


@every_page
def test_links_lead_somewhere(page):
    for path, anchor in links(page):
        assert path.exists(), path
        if anchor:
            headings = re.findall(r"^#+ (.+)$", FENCE.sub("", path.read_text(encoding="utf-8")), flags=re.MULTILINE)
            assert anchor in map(slug, headings), f"{path}#{anchor}"


def test_every_page_stands_in_the_navigation_of_the_site():
    """Whether each stands there once, and the rest of the site is right, is seen by the build: see tests/website."""
    settings = (ROOT / "website" / "mkdocs.yml").read_text(encoding="utf-8")
    named = set(re.findall(r"^ +- (\S+\.md)$", settings, flags=re.MULTILINE))
    written = {"index.md", *(name.removeprefix("docs/") for name in PAGES if name != "README.md")}
    assert named == written, "website/mkdocs.yml, nav: one line for each page"


def test_every_page_is_reached_from_the_readme():
    names = {path: name for name, path in PAGES.items()}
    reached, ahead = set(), ["README.md"]
    while ahead:
        page = ahead.pop()
        reached.add(page)
        ahead += [name for path, _ in links(page) if (name := names.get(path)) and name not in reached]
    assert set(PAGES) - reached == set()


@every_page
def test_tables_are_those_of_the_result_files(page):
    assert with_results(TEXTS[page], RESULTS) == TEXTS[page], "run: python -m trifuse.benchmarks.reporting.tables"


def test_all_tables_are_shown():
    named = [name for text in TEXTS.values() for name in re.findall(r"<!-- results: (\S+) -->", text)]
    assert len(named) >= 5
    assert any("<!-- overview: cpu -->" in text for text in TEXTS.values())
    pages = {"report.md", "torture.md"}  # too long to be shown: these are linked
    assert {path.name for path in RESULTS.glob("*.md")} - pages <= set(named)


# ------------------------------------------------------------------------------------------------ the plan, the names


@pytest.mark.parametrize("page", PLANS)
def test_plan_names_what_is_there(page):
    """Each line begins with names, below the folder that stands above it, further left; <name> stands for any name."""
    plan = TEXTS[page].split(PLANS[page])[1].split("```")[1]
    above: list[tuple[int, Path]] = []
    seen = 0
    for line in plan.strip("\n").splitlines():
        indent = len(line) - len(line.lstrip())
        names = re.split(r",\s*", re.split(r"\s{2,}|\s->", line.strip())[0])
        above = [(left, folder) for left, folder in above if left < indent]
        folder = above[-1][1] if above else ROOT
        for name in names:
            assert any(folder.glob(re.sub(r"<[^>]+>", "*", name.rstrip("/")))), line
            seen += 1
        if names[0].endswith("/") and "<" not in names[0]:
            above.append((indent, folder / names[0]))
    assert seen >= 15
    assert all(f"{folder}/" in plan for folder in FOLDERS)


def test_every_layout_is_described():
    """The table of the layouts links to a section for each, which the test of links requires."""
    missing = [layout.name for layout in LAYOUTS if f"](#{layout.name})" not in TEXTS["docs/layouts.md"]]
    remedy = "add a section '## <layout>' for each, then run: python -m trifuse.benchmarks.reporting.tables"
    assert missing == [], f"docs/layouts.md: {remedy}"


def test_every_network_is_described():
    code = set(inline(TEXTS["docs/networks.md"]))
    for experiment in experiments():
        missing = {experiment.package, *experiment.variants} - code
        assert missing == set(), f"docs/networks.md: describe {experiment.name}, and name these, as code"


def test_house_names_every_folder_of_code():
    packages = {path.parent.name for name in FOLDERS[:4] for path in (ROOT / name).rglob("__init__.py")}
    missing = {name for name in packages if f"{name}/" not in TEXTS["docs/house.md"]}
    assert missing == set(), "docs/house.md, 'Folders and files': add these folders"


def signature(name: str, function: object) -> str:
    """Return how a function or a block is called, without types."""
    found = inspect.signature(function)  # type: ignore[arg-type]
    bare = [parameter.replace(annotation=parameter.empty) for parameter in found.parameters.values()]
    return f"{name}{found.replace(parameters=bare, return_annotation=found.empty)}"


def test_every_operator_and_block_is_described():
    code = set(inline(TEXTS["docs/operators_and_blocks.md"]))
    public = {name: getattr(kernels, name) for name in kernels.OPERATORS}
    public |= {name: getattr(blocks, name) for name in blocks.__all__}
    missing = {text for name, function in public.items() if (text := signature(name, function)) not in code}
    assert missing == set(), "docs/operators_and_blocks.md: add these signatures, as code"


def test_every_error_is_described():
    errors = {name for name in kernels.__all__ if inspect.isclass(getattr(kernels, name))}
    of_testing = {name: getattr(testing, name) for name in testing.__all__}
    errors |= {name for name, one in of_testing.items() if inspect.isclass(one) and issubclass(one, Exception)}
    described = {row.split("`")[1] for row in TEXTS["docs/errors.md"].splitlines() if row.startswith("| `")}
    assert errors == described, "docs/errors.md: one row for each error class of trifuse.kernels and its testing"


def test_every_exit_code_is_described():
    codes = re.findall(r"(\d+) \w+", build_parser().epilog or "")
    rows = re.findall(r"^\| (\d+) \|", TEXTS["docs/errors.md"], flags=re.MULTILINE)
    assert len(codes) >= 6
    assert set(codes) - set(rows) == set(), "docs/errors.md: add a row for each of these exit codes"

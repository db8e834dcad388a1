"""The command-line options of the benchmarks, and how one of them is shown and kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from .harness import TINY, Case, replay

MOST_SECONDS = 1800  # a slow form on a slow machine is a result, not a fault
SCRATCH = Path("build/benchmarks")  # never committed: a run by hand may hold some cases only
WRITTEN = pytest.StashKey[set[Path]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("trifuse benchmarks")
    group.addoption("--seconds", type=float, default=2.0, help="time to spend on each provider of a case")
    group.addoption("--tiny", action="store_true", help="run tiny cases alone, which show only that everything runs")
    group.addoption("--results", type=Path, default=SCRATCH, help=f"folder for the JSON files ({SCRATCH})")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    tiny = config.getoption("tiny")
    left_out = [item for item in items if hasattr(item, "callspec") and tiny != (TINY in _case_of(item).devices)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]
    if config.pluginmanager.hasplugin("timeout"):
        for item in items:
            item.add_marker(pytest.mark.timeout(MOST_SECONDS))


@pytest.hookimpl(trylast=True)  # below pytest-benchmark's table
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if written := config.stash.get(WRITTEN, None):
        terminalreporter.write_line(f"figures written: {', '.join(map(str, sorted(written)))}")


def _case_of(item: pytest.Item) -> Case:
    return item.callspec.params["case"]


@pytest.fixture
def show(request, benchmark):
    """Measure one provider of a comparison on one case and pass, and show it in pytest-benchmark's table."""

    def show(comparison, case, timed, provider):
        benchmark.group = f"{comparison.name}: {case.name}: {timed.name}"
        try:
            timing = comparison.timing(case, timed, provider, seconds=request.config.getoption("seconds"))
        except LookupError as reason:
            pytest.skip(str(reason))
        finally:
            written = comparison.write(request.config.getoption("results"))  # now: the next may outlast a time limit
            if written is not None:
                request.config.stash.setdefault(WRITTEN, set()).add(written)
        benchmark.name = provider
        replay(benchmark, timing)

    return show

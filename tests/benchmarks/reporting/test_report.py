"""The report runs every part within its time, hides none that failed, and depends on nothing of whoever runs it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from trifuse.architectures.cli import bench
from trifuse.architectures.cli.main import main
from trifuse.benchmarks.reporting import report
from trifuse.kernels import OPERATORS

ROOT = Path(__file__).resolve().parents[3]


TESTS = report.TESTS
COUNTED = ("-m", "trifuse.benchmarks.reporting.counted")


def python(name: str, code: str, share: float = 1):
    return report.Part(name, (sys.executable, "-c", code), share)


def test_every_benchmark_has_its_share_of_the_time():
    files = {path.stem.removeprefix("bench_") for path in (ROOT / "benchmarks").glob("bench_*.py")}
    assert report.GPU_SHARES.keys() == files | {TESTS, *report.TOOLS}
    assert min(report.GPU_SHARES.values()) >= 10


def test_parts_share_the_time_that_is_left(tmp_path, monkeypatch):
    """All of them fit, whatever they take; one that is done early leaves more to the rest."""
    took = {"early": 1.0, "out of time": None, "late": None}
    limits = {}

    def run_part(part, limit_s, log, *arguments):
        limits[part.name] = limit_s
        log.write_text("")
        seconds = took[part.name] or limit_s
        return report.Outcome(part, 0 if took[part.name] else 124, seconds, limit_s)

    monkeypatch.setattr(report, "run_part", run_part)
    listed = [python("early", "", 2), python("out of time", "", 3), python("late", "", 1)]
    assert report.run_parts(listed, {}, tmp_path, tmp_path, {}, report.GPU_SECONDS) == 124
    assert limits == pytest.approx({"early": 480 / 3, "out of time": 479 * 3 / 4, "late": 479 / 4})
    assert report.GPU_SECONDS <= 8 * 60
    assert (
        "| out of time |       124 |     359 |   359 |             not counted |"
        in (tmp_path / "report.md").read_text()
    )
    took |= dict.fromkeys(took, 1.0)
    assert report.run_parts(listed, {}, tmp_path, tmp_path, {}, None) == 0
    assert set(limits.values()) == {None}


def test_parts_are_the_benchmark_files_and_the_tests_come_first(tmp_path):
    listed = report.parts(report.part_names(), tmp_path, tmp_path, 0.5, tests=True)
    assert [(part.name, part.share) for part in listed] == list(report.GPU_SHARES.items())
    for part in listed:
        if part.name in report.TOOLS:
            continue
        (file,) = (word for word in part.command if word.endswith(".py"))
        assert Path(file).is_file()
        assert ("--benchmark-only" in part.command) == (part.name != TESTS)
    for part in listed:
        assert part.command[:4] == (sys.executable, *COUNTED, str(report.count_of(tmp_path, part.name)))
    tools = {part.name: part.command[4:] for part in listed if part.name in report.TOOLS}
    assert tools == {
        name: (f"trifuse.benchmarks.reporting.{name}", f"--out={tmp_path}", f"--seconds={seconds}")
        for name, seconds in {"host_cost": 0.5, "scaling": 0.125}.items()
    }
    (new,) = report.parts(["a new one"], tmp_path, tmp_path, 0.5, tests=False)
    assert new.share == report.SHARE_OF_OTHERS


@pytest.mark.parametrize(("kind", "seconds"), [("cuda", report.GPU_SECONDS), ("cpu", None)])
def test_time_is_limited_on_a_gpu_alone(kind, seconds, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(report, "machine_of", lambda *arguments: {"kind": kind})
    monkeypatch.setattr(report, "run_parts", lambda *arguments: seen.append(arguments) or 0)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert report.main(["--out", str(tmp_path), "--tests", "--only", "fias"]) == 0
    ((listed, *_, given),) = seen
    assert [part.name for part in listed] == [TESTS, "fias"]
    assert given == seconds


def test_only_known_parts_are_taken(tmp_path, capsys, monkeypatch):
    with pytest.raises(SystemExit, match="2"):
        report.main(["--out", str(tmp_path), "--only", "fiass"])
    said = capsys.readouterr().err
    assert "'fiass' (choose from" in said
    assert "report.py" not in said
    monkeypatch.setattr(report, "GPU_TESTS", tmp_path / "none.py")  # an installed copy
    with pytest.raises(SystemExit, match="2"):
        report.main(["--out", str(tmp_path), "--tests"])
    assert "--tests needs the repository" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["fiass", "report"])
def test_the_command_says_by_its_own_name_which_parts_there_are(name, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["bench", "--out", str(tmp_path), "--only", name])
    said = capsys.readouterr().err
    assert "trifuse bench: error: argument --only" in said
    assert "report.py" not in said
    assert all(f"{part}" in said for part in report.part_names())


def test_the_command_lists_the_parts_of_the_report(capsys):
    assert sorted(bench.part_names()) == sorted(report.part_names())
    with pytest.raises(SystemExit, match="0"):
        main(["bench", "--help"])
    listed = "".join(capsys.readouterr().out.split())
    assert ",".join(bench.part_names()) in listed


def test_an_operator_stands_for_the_part_that_times_it(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(report, "machine_of", lambda *arguments: {"kind": "cpu"})
    monkeypatch.setattr(report, "run_parts", lambda listed, *arguments: seen.append(listed) or 0)
    names = ["channel_gate", "fias", "spatial_gate", "dilated_attention_weights"]
    assert report.main(["--out", str(tmp_path), "--only", *names]) == 0
    assert [part.name for part in seen[0]] == ["gates", "fias", "dilated_attention"]
    for operator in OPERATORS:
        assert report.main(["--out", str(tmp_path), "--only", operator]) == 0
        assert [part.name for part in seen[-1]] == [OPERATORS[operator]]
        assert OPERATORS[operator] in report.part_names()


def test_the_worst_part_decides_and_none_is_hidden(tmp_path, capsys):
    (tmp_path / "old.md").write_text("an old table")
    listed = [
        python("sound", f"print('all is well'); open({str(tmp_path / 'new.md')!r}, 'w').write('a table')"),
        python("failing", "import sys; print('what went wrong'); sys.exit(3)"),
        python("killed", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"),
        python("sound again", f"open({str(tmp_path / 'new.json')!r}, 'w').write('{{}}')"),  # its tables are in new.md
    ]
    assert report.run_parts(listed, {"kind": "cpu", "driver": None}, tmp_path, tmp_path, dict(os.environ), None) == 139
    text, printed = (tmp_path / "report.md").read_text(), capsys.readouterr().out.splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    assert [row[:2] for row in cells if row[0] in {part.name for part in listed}] == [
        ["sound", "0"],
        ["failing", "3"],
        ["killed", "139"],
        ["sound again", "0"],
    ]
    assert "what went wrong" in text
    assert "all is well" not in text
    assert "an old table" not in text
    assert text.count("## new\n\na table\n") == text.count("## new") == 1
    assert [line.split()[:2] for line in printed[:4]] == [
        ["1/4", "sound"],
        ["2/4", "failing"],
        ["3/4", "killed"],
        ["4/4", "sound"],
    ]
    assert "exit code 3" in printed[1]
    assert " s so far)" in printed[3]


LAUNCHING = """
from trifuse.kernels import library
library.launched["_some_kernel"] += 41
library.launched["_another_kernel"] += 1
"""
FALLING_BACK = """
import torch
from trifuse.kernels import library
library._unusable["upsample_argmax", torch.device("cuda", 0)] = "no C compiler"
"""


def counted(name, code, tmp_path, monkeypatch):
    """A part that runs a module as the parts of a report are run."""
    (tmp_path / f"{name}_module.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    command = (sys.executable, *COUNTED, str(report.count_of(tmp_path, name)), f"{name}_module", "argument")
    return report.Part(name, command, 1)


def leaving(count, tmp_path, name=TESTS):
    """A part that leaves a count as a counted module does, without what that imports."""
    whole = json.dumps({"kernels": {}, "fallbacks": {}, "ended": True} | count)
    return python(name, f"open({str(report.count_of(tmp_path, name))!r}, 'w').write({whole!r})")


def test_launches_are_told(tmp_path, capsys):
    part = leaving({"kernels": {"_some_kernel": 41, "_another_kernel": 1}}, tmp_path)
    assert report.run_parts([part], {"kind": "cuda"}, tmp_path, tmp_path, dict(os.environ), 60) == 0
    text = (tmp_path / "report.md").read_text()
    assert re.search(r"\| tests on the GPU +\| +0 \|.*\| +42 \|", text)
    assert "Refused" not in text
    assert "42 launches of our Triton kernels" in capsys.readouterr().out


def test_tests_of_a_gpu_without_a_launch_fail(tmp_path, capsys):
    part = leaving({}, tmp_path)
    assert report.run_parts([part], {"kind": "cuda"}, tmp_path, tmp_path, dict(os.environ), 60) == report.REFUSED
    why = "tests on the GPU: not one Triton kernel was launched."
    assert f"* Refused: {why}" in (tmp_path / "report.md").read_text()
    assert "refused: not one Triton kernel was launched" in capsys.readouterr().out


def test_tests_of_a_gpu_where_there_is_none_say_so(tmp_path, capsys):
    part = leaving({}, tmp_path)
    assert report.run_parts([part], {"kind": "cpu"}, tmp_path, tmp_path, dict(os.environ), None) == report.REFUSED
    why = "torch sees no GPU here, all tests were skipped; run them on a machine with one"
    assert f"* Refused: tests on the GPU: {why}." in (tmp_path / "report.md").read_text()
    assert f"refused: {why}" in capsys.readouterr().out


def test_tests_of_a_gpu_that_never_started_are_not_said_to_have_launched_nothing(tmp_path):
    killed, unsaid = (report.Outcome(report.Part(TESTS, (), 1), code, 1.0, 1.0) for code in (report.OUT_OF_TIME, 0))
    assert report.examined(killed, tmp_path, []).refused == [
        "out of time after 1 s, so that cases are missing; nothing was counted"
    ]
    assert report.examined(unsaid, tmp_path, []).code == report.REFUSED


KILLED_LATER = """
import json, os, signal, sys, time
while json.load(open(sys.argv[1]))["kernels"] != library.launched:
    time.sleep(0.01)
if sys.argv[2] == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(600)
"""


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("how", "code", "told", "why"),
    [
        ("kill", 137, "42, then ended", "ended in its midst"),
        ("wait", 124, "42, then out of time", r"out of time after \d+ s"),
    ],
)
def test_a_part_that_is_killed_keeps_what_it_counted_and_is_refused(how, code, told, why, tmp_path, monkeypatch):
    part = counted("gates", LAUNCHING + KILLED_LATER, tmp_path, monkeypatch)
    count = report.count_of(tmp_path, "gates")
    part = replace(part, command=(*part.command[:-1], str(count), how))

    def in_time(process, timeout=None):
        """Let the time be over as soon as the launches were written down."""
        while process.poll() is None and not (count.exists() and json.loads(count.read_text())["kernels"]):
            time.sleep(0.01)
        return wait(process, timeout and (1 if how == "wait" else 100))

    wait = subprocess.Popen.wait
    monkeypatch.setattr(subprocess.Popen, "wait", in_time)
    assert report.run_parts([part], {"kind": "cuda"}, tmp_path, tmp_path, dict(os.environ), 60) == code
    text = (tmp_path / "report.md").read_text()
    assert re.search(rf"\| gates +\| +{code} \|.*\| +{told} \|", text)
    refusal = f"Refused: gates: {why}, so that cases are missing; 42 launches of our kernels until then"
    assert re.search(refusal, text)


def test_a_part_that_leaves_without_its_count_is_refused(tmp_path, monkeypatch):
    part = counted("gates", LAUNCHING + "import os\nos._exit(0)", tmp_path, monkeypatch)
    assert report.run_parts([part], {"kind": "cuda"}, tmp_path, tmp_path, dict(os.environ), 60) == report.REFUSED


def test_a_part_in_which_an_operator_fell_back_fails(tmp_path):
    part = leaving({"fallbacks": {"upsample_argmax": "cuda:0: no C compiler"}}, tmp_path, "gates")
    assert report.run_parts([part], {"kind": "cuda"}, tmp_path, tmp_path, dict(os.environ), 60) == report.REFUSED
    why = "gates: upsample_argmax fell back to plain PyTorch on cuda:0: no C compiler."
    assert f"* Refused: {why}" in (tmp_path / "report.md").read_text()


def test_a_part_that_wrote_a_doubtful_file_fails(tmp_path):
    record = {"stamp": {"fallbacks": {}}, "rows": [{"provider": "trifuse", "case": "c", "pass": "p", "launches": 0}]}
    part = python("gates", f"open({str(tmp_path / 'gates.cuda.json')!r}, 'w').write({json.dumps(record)!r})")
    assert report.run_parts([part], {"kind": "cuda"}, tmp_path, tmp_path, dict(os.environ), 60) == report.REFUSED
    why = "gates: gates.cuda.json: trifuse (c, p) launched no kernel."
    assert f"* Refused: {why}" in (tmp_path / "report.md").read_text()


def test_a_counted_module_runs_as_it_does_alone(tmp_path, monkeypatch):
    """Its arguments, its name, its exit code; launches and fallbacks are written down however it ends."""
    code = "import sys\nassert (__name__, sys.argv[1:]) == ('__main__', ['argument']), sys.argv\n"
    part = counted("ending", LAUNCHING + FALLING_BACK + code + "sys.exit(7)", tmp_path, monkeypatch)
    outcome = report.run_part(part, None, tmp_path / "log", tmp_path, dict(os.environ))
    assert (outcome.code, (tmp_path / "log").read_text()) == (7, "")
    examined = report.examined(outcome, tmp_path, [])
    assert (examined.launches, examined.whole) == (42, True)
    assert examined.refused == ["upsample_argmax fell back to plain PyTorch on cuda:0: no C compiler"]


def test_a_part_out_of_time_is_ended_with_all_that_it_started(tmp_path):
    grandchild = "import time; time.sleep(1); open('grandchild', 'w')"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {grandchild!r}])"
    outcome = report.run_part(python("hangs", code), 0.3, tmp_path / "log", tmp_path, dict(os.environ))
    assert outcome.code == report.OUT_OF_TIME == 124
    assert outcome.seconds >= 0.3
    time.sleep(max(0, 1.5 - outcome.seconds))
    assert not (tmp_path / "grandchild").exists()


def test_a_report_stopped_by_hand_stops_its_part(tmp_path, monkeypatch):
    class Stopped:
        pid = 4321
        waited = 0

        def __init__(self, *arguments, **options):
            assert options["process_group"] == 0

        def wait(self, limit=None):
            Stopped.waited += 1
            if Stopped.waited == 1:
                raise KeyboardInterrupt

    killed = []
    monkeypatch.setattr(report.subprocess, "Popen", Stopped)
    monkeypatch.setattr(report.os, "killpg", lambda *arguments: killed.append(arguments))
    with pytest.raises(KeyboardInterrupt):
        report.run_part(python("stopped", ""), None, tmp_path / "log", tmp_path, {})
    assert killed == [(4321, report.signal.SIGKILL)]
    assert Stopped.waited == 2


def test_this_very_copy_is_importable_anywhere(tmp_path, monkeypatch):
    """Also on a machine where nothing is installed, as its own pytest plugin; with no options of another pytest."""
    monkeypatch.setenv("PYTEST_ADDOPTS", "-n auto")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    scratch, elsewhere = tmp_path / "scratch", tmp_path / "elsewhere"
    scratch.mkdir()
    elsewhere.mkdir()
    variables = report.environment(scratch, "0123abc")
    assert not [name for name in variables if name.startswith(("PYTEST_", "TRITON_INTERPRET"))]
    code = (
        "import os, json, trifuse.kernels, importlib.metadata as m;"
        "print(json.dumps([trifuse.kernels.__file__, m.version('trifuse'), os.environ['TRIFUSE_COMMIT'],"
        "[e.value for e in m.entry_points(group='pytest11', name='trifuse')]]))"
    )
    said = subprocess.run([sys.executable, "-c", code], cwd=elsewhere, env=variables, stdout=subprocess.PIPE, text=True)
    place, version, commit, plugins = json.loads(said.stdout)
    assert Path(place).is_relative_to(scratch)
    assert version[0].isdigit()
    assert commit == "0123abc"
    assert "trifuse.kernels.testing" in plugins


def test_the_command_hands_over_to_the_report(tmp_path, monkeypatch):
    started = []

    def run(command):
        started.append(command)
        return subprocess.CompletedProcess(command, 7)

    monkeypatch.setattr(subprocess, "run", run)
    assert main(["bench", "--out", str(tmp_path), "--only", "fias", "gates", "--seconds", "0.25"]) == 7
    (command,) = started
    assert command[:3] == [sys.executable, "-m", "trifuse.benchmarks.reporting.report"]
    assert command[3:] == ["--out", str(tmp_path), "--only", "fias", "gates", "--seconds", "0.25"]
    main(["bench", "--out", str(tmp_path)])
    assert "--only" not in started[1]


@pytest.mark.parametrize("seconds", ["nan", "inf", "-1", "soon"])
def test_l2_a_time_that_is_none_is_refused(tmp_path, monkeypatch, capsys, seconds):
    monkeypatch.setattr(subprocess, "run", lambda command: pytest.fail(f"started {command}"))
    with pytest.raises(SystemExit, match="2"):
        main(["bench", "--out", str(tmp_path), f"--seconds={seconds}"])
    assert f"expected a number of seconds, 0 or more, got '{seconds}'" in capsys.readouterr().err

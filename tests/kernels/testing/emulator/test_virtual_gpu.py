"""Compiled kernels on the virtual GPU: each planted fault is found, by name and line, and nothing in sound kernels."""

from __future__ import annotations

import json
import pickle
import platform
import re
from pathlib import Path

import pytest
from ready_python import ROOT, SUPPORT, run_with_compiler

from trifuse.kernels import BackendError, testing
from trifuse.kernels.testing.emulator import machine
from trifuse.kernels.testing.emulator.ptx import Place

pytest.importorskip("triton", reason="the virtual GPU runs what triton compiles")

SOUND = ("sound", "aligned", "initialised", "with_barrier", "sum_of_warps", "atomic_sums", "in_place_with_spare_warps")
SOUND += ("overlapping_stores_in_a_loop", "atomic_for_all", "filled_past_torch", "sines_with_local_memory")
# The kind of each planted fault, and the argument in which it shows.
FAULTS = {
    "out_of_bounds_load": ("out of bounds", "x"),
    "out_of_bounds_store": ("out of bounds", "out"),
    "misaligned": ("misaligned", "x"),
    "uninitialised": ("uninitialised", "x"),
    "race_between_programs": ("race between programs", "out"),
    "missing_barrier": ("race between warps", "buffer"),
    "race_between_threads": ("race between threads", "out"),
    "missing_barrier_in_shared_memory": ("race in shared memory", ""),
    "shared_memory_out_of_bounds": ("shared memory out of bounds", ""),
    "race_of_spare_warps_and_programs": ("race between programs", "x"),
    "race_between_parts_of_a_store": ("race between threads", "out"),
    "atomic_within_a_program": ("race between programs", "counter"),
    "uninitialised_bools": ("uninitialised", "x"),
    "order_of_programs": ("order of programs", "out"),
}


@pytest.fixture(scope="module")
def found() -> dict:
    child = run_with_compiler(SUPPORT / "faulty_kernels.py")
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout)


def test_every_case_is_looked_at(found):
    assert found.keys() == {*SOUND, *FAULTS, "unsupported", "autotuned"}


@pytest.mark.parametrize("name", SOUND)
def test_nothing_is_found_in_a_sound_kernel(found, name):
    assert (found[name]["findings"], found[name]["refused"]) == ([], "")


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found_by_name_and_line(found, name):
    result, (kind, argument) = found[name], FAULTS[name]
    finding = next(finding for finding in result["findings"] if finding["kind"] == kind)
    assert result["raised"]
    assert finding["argument"] == argument
    assert Path(finding["file"]).name == "faulty_kernels.py"
    planted = {f["line"] for f in result["findings"] if f["kind"] == kind}
    assert result["line"] is None or result["line"] in planted
    assert f"{kind}: {finding['kernel']}, " in finding["text"]


def test_spare_warps_that_only_read_race_with_nobody(found):
    kinds = {finding["kind"] for finding in found["race_of_spare_warps_and_programs"]["findings"]}
    assert kinds == {"race between programs"}


def test_an_access_is_placed_to_the_byte_the_program_and_the_thread(found):
    (load,) = found["out_of_bounds_load"]["findings"]
    assert (load["offset"], load["program"], load["thread"]) == (4000, [7, 0, 0], 104)
    (store,) = found["out_of_bounds_store"]["findings"]
    assert (store["offset"], store["program"], store["thread"]) == (-4, [0, 0, 0], 0)
    assert "stores 4 bytes at byte -4 of out, of which 512 bytes are there" in store["text"]


def test_a_race_names_both_sides(found):
    (race,) = found["race_between_programs"]["findings"]
    assert re.search(r"which program \(\d, 0, 0\) accessed at .*faulty_kernels\.py:\d+", race["text"])


def test_code_of_triton_s_library_is_reported_at_the_line_that_calls_it(found):
    findings = found["missing_barrier_in_shared_memory"]["findings"]
    assert {finding["line"] for finding in findings} == {found["missing_barrier_in_shared_memory"]["line"]}
    assert "(inside standard.py:" in findings[0]["text"]


def test_an_unsupported_instruction_is_refused_by_name_kernel_and_line(found):
    refused = found["unsupported"]["refused"]
    assert re.match(r"product_kernel: the virtual GPU does not run `wgmma[^`]*`, at .*faulty_kernels\.py:\d+", refused)
    assert f"faulty_kernels.py:{found['unsupported']['line']};" in refused


def test_an_autotuned_kernel_is_refused_with_advice(found):
    assert "kernel.fn[grid]" in found["autotuned"]["refused"]


def test_interpreted_kernels_are_refused(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(BackendError, match="TRITON_INTERPRET=1 lets Triton interpret"), testing.virtual_gpu():
        pytest.fail("the block ran")


def test_without_a_compiler_the_error_says_what_to_install(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from trifuse.kernels.testing import virtual_gpu\nwith virtual_gpu():\n    pass\n", encoding="utf-8"
    )
    child = run_with_compiler(script, CC=str(tmp_path / "no-compiler"), TRITON_CACHE_DIR=str(tmp_path))
    assert child.returncode == 1
    assert "BackendError: virtual_gpu builds its machine with a C++ compiler" in child.stderr
    assert "apt-get install g++" in child.stderr


PAGE = (ROOT / "docs" / "virtual_gpu.md").read_text(encoding="utf-8")
EXAMPLE = re.search(r"^```python\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)[1]


def test_the_page_s_example_runs_and_its_fault_is_found_as_shown(tmp_path):
    script = tmp_path / "check_add.py"
    script.write_text(EXAMPLE, encoding="utf-8")
    child = run_with_compiler(script, folder=tmp_path)
    assert child.returncode == 0, child.stderr
    script.write_text(EXAMPLE.replace("total, mask=at < n)", "total)"), encoding="utf-8")
    child = run_with_compiler(script, folder=tmp_path)
    assert child.returncode == 1
    shown = re.search(r"^```text\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)[1]
    assert " ".join(shown.split()) in " ".join(child.stderr.replace(f"{tmp_path}/", "").split())


def test_the_fixture_runs_a_block_around_a_test(tmp_path):
    kernel = EXAMPLE.split("with virtual_gpu():")[0]
    test = (
        "def test_add(virtual_gpu):\n"
        "    x, out = torch.randn(1000), torch.empty(1024)\n"
        "    add_kernel[(8,)](x, x, out, {n}, BLOCK=128)\n"
        "    assert [launch.kernel for launch in virtual_gpu.launches] == ['add_kernel']\n"
    )
    file = tmp_path / "test_add.py"
    for n, outcome in ((1000, "1 passed"), (1024, "1 passed, 1 error")):
        file.write_text(kernel + test.format(n=n), encoding="utf-8")
        command = ("-m", "pytest", "-q", "-p", "no:cacheprovider", file)
        child = run_with_compiler(*command, folder=tmp_path, COLUMNS="400")
        assert outcome in child.stdout, child.stdout + child.stderr
    (summary,) = (line for line in child.stdout.splitlines() if line.startswith("ERROR "))
    assert "trifuse.kernels.testing.KernelFaults: 1 fault in compiled kernels: out of bounds: add_kernel" in summary
    assert "virtual_gpu.py:" not in child.stdout  # where a fault is raised helps nobody


def test_faults_are_named_by_their_public_path_and_pass_between_processes(found):
    assert testing.KernelFaults.__module__ == testing.UnsupportedInstruction.__module__ == "trifuse.kernels.testing"
    place = Place("a.py", 3)
    findings = [testing.Finding("misaligned", f"kernel{n}", place, "loads") for n in range(2)]
    for some in (findings, findings[:1]):
        back = pickle.loads(pickle.dumps(testing.KernelFaults(some)))
        assert type(back) is testing.KernelFaults
        assert back.findings == some
        assert str(back) == str(testing.KernelFaults(some))
    assert str(back) == f"1 fault in compiled kernels: {findings[0]}"


def test_a_dependence_on_the_order_counts_its_bytes_and_names_the_way_out(found):
    (finding,) = (f for f in found["order_of_programs"]["findings"] if f["kind"] == "order of programs")
    assert re.search(r": (1 byte of out depends|[2-9]\d* bytes of out depend) on the order", finding["text"])
    assert "write virtual_gpu(orders=1)" in finding["text"]


def test_a_system_without_proc_has_a_processor_all_the_same(monkeypatch):
    """It is part of the name under which the built machine is kept."""

    def absent(path, **options):
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "read_text", absent)
    assert machine._processor() == platform.processor()

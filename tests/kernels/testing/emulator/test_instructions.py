"""Instructions compute what PTX says, against what Python and PyTorch compute; faults that only PTX can show."""

from __future__ import annotations

import math
import struct

import pytest
import torch
from handwritten_ptx import compute, kernel_of, run

from trifuse.kernels.testing import UnsupportedInstruction
from trifuse.kernels.testing.emulator import machine
from trifuse.kernels.testing.emulator.machine import Program

pytest.importorskip("triton", reason="the machine is built with triton's builder")

WORDS = [0, 1, 2, 7, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0xFFFFFFF9, 12345678]
OTHERS = [3, 0xFFFFFFFF, 5, 0xFFFFFFFE, 1, 0xFFFFFFFF, 0xFFFFFFFF, 3, 1000]


def signed(word: int, bits: int = 32) -> int:
    return word - (1 << bits) if word >> (bits - 1) else word


def bits32(value: float) -> int:
    return struct.unpack("<I", struct.pack("<f", value))[0]


def float32(bits: int) -> float:
    return struct.unpack("<f", struct.pack("<I", bits))[0]


INTEGERS = {
    "add.s32": lambda a, b: a + b,
    "sub.s32": lambda a, b: a - b,
    "mul.lo.s32": lambda a, b: a * b,
    "mul.hi.s32": lambda a, b: signed(a) * signed(b) >> 32,
    "mul.hi.u32": lambda a, b: a * b >> 32,
    "min.s32": lambda a, b: min(signed(a), signed(b)),
    "max.u32": max,
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "xor.b32": lambda a, b: a ^ b,
    "shl.b32": lambda a, b: a << b if b < 32 else 0,
    "shr.u32": lambda a, b: a >> min(b, 32),
    "shr.s32": lambda a, b: signed(a) >> min(b, 31),
    "div.u32": lambda a, b: a // b,
    "rem.u32": lambda a, b: a % b,
    "div.s32": lambda a, b: math.trunc(signed(a) / signed(b)),
    "rem.s32": lambda a, b: int(math.fmod(signed(a), signed(b))),
}


@pytest.mark.parametrize("name", INTEGERS)
def test_integer_arithmetic(name):
    result = compute(name, "r", ("r", WORDS), ("r", OTHERS))
    assert result == [INTEGERS[name](a, b) % (1 << 32) for a, b in zip(WORDS, OTHERS, strict=True)]


@pytest.mark.parametrize(("name", "sign"), [("mul.wide.s32", signed), ("mul.wide.u32", int)])
def test_wide_products(name, sign):
    result = compute(name, "rd", ("r", WORDS), ("r", OTHERS))
    assert result == [sign(a) * sign(b) % (1 << 64) for a, b in zip(WORDS, OTHERS, strict=True)]


NUMBERS = [0.0, -0.0, 1.5, -2.25, 1e-40, 3e38, math.inf, -math.inf, math.nan, 0.1]
SECONDS = [-0.0, 0.0, 0.1, 4.0, 1e-40, 3e38, 1.0, math.inf, 1.0, math.nan]
FLOATS = {
    "add.f32": torch.add,
    "sub.f32": torch.sub,
    "mul.f32": torch.mul,
    "div.full.f32": torch.div,
    "max.f32": torch.fmax,
    "min.f32": torch.fmin,
    "max.NaN.f32": torch.maximum,
    "min.NaN.f32": torch.minimum,
}


@pytest.mark.parametrize("name", FLOATS)
def test_float_arithmetic(name):
    words = compute(name, "r", ("r", list(map(bits32, NUMBERS))), ("r", list(map(bits32, SECONDS))))
    expected = FLOATS[name](torch.tensor(NUMBERS), torch.tensor(SECONDS))
    torch.testing.assert_close(torch.tensor(list(map(float32, words))), expected, rtol=0, atol=0, equal_nan=True)


def test_zeros_have_an_order():
    zero, negative = bits32(0.0), bits32(-0.0)
    assert compute("max.f32", "r", ("r", [zero, negative]), ("r", [negative, zero])) == [zero, zero]
    assert compute("min.f32", "r", ("r", [zero, negative]), ("r", [negative, zero])) == [negative, negative]


def test_a_fused_product_is_rounded_once():
    a, c = 1 + 2**-12, -(1 + 2**-11)
    (word,) = compute("fma.rn.f32", "r", ("r", [bits32(a)]), ("r", [bits32(a)]), ("r", [bits32(c)]))
    assert float32(word) == 2**-24


def test_subnormal_values_are_flushed_where_ptx_says_so():
    tiny = bits32(1e-40)
    assert compute("mul.f32", "r", ("r", [tiny]), ("r", [bits32(1.0)])) == [tiny]
    assert compute("mul.ftz.f32", "r", ("r", [tiny]), ("r", [bits32(1.0)])) == [0]


COMPARISONS = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a == a and b == b and a != b,
    "lt": lambda a, b: a < b,
    "ge": lambda a, b: a >= b,
    "neu": lambda a, b: a != b,
    "ltu": lambda a, b: not a >= b,
    "num": lambda a, b: a == a and b == b,
    "nan": lambda a, b: a != a or b != b,
}


@pytest.mark.parametrize("name", COMPARISONS)
def test_comparisons_of_floats(name):
    result = compute(f"setp.{name}.f32", "p", ("r", list(map(bits32, NUMBERS))), ("r", list(map(bits32, SECONDS))))
    assert result == [
        int(COMPARISONS[name](float32(bits32(a)), float32(bits32(b)))) for a, b in zip(NUMBERS, SECONDS, strict=True)
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_conversions_to_narrow_floats_and_back(dtype):
    name = {torch.bfloat16: "bf16", torch.float16: "f16"}[dtype]
    values = torch.tensor([0.1, -3.14159, 65504.0, 1e-7, 1 + 2**-9, 1 + 3 * 2**-9, 1e5, math.inf])
    expected = values.to(dtype)
    halves = compute(f"cvt.rn.{name}.f32", "rs", ("r", [bits32(value) for value in values.tolist()]))
    assert halves == [word % (1 << 16) for word in expected.view(torch.int16).tolist()]
    words = compute(f"cvt.f32.{name}", "r", ("rs", halves))
    assert list(map(float32, words)) == expected.float().tolist()


@pytest.mark.parametrize(
    ("name", "output", "kind", "values", "expected"),
    [
        (
            "cvt.rzi.s32.f32",
            "r",
            "r",
            [bits32(v) for v in (1.9, -1.9, 3e9, -3e9, math.nan)],
            [1, -1, 2**31 - 1, -(2**31), 0],
        ),
        ("cvt.rmi.s32.f32", "r", "r", [bits32(v) for v in (1.9, -1.1)], [1, -2]),
        ("cvt.rni.s32.f32", "r", "r", [bits32(v) for v in (0.5, 1.5, -2.5)], [0, 2, -2]),
        ("cvt.rn.f32.s32", "r", "r", [16777217, 0xFFFFFFFF], [bits32(16777216.0), bits32(-1.0)]),
        ("cvt.rn.f32.u64", "r", "rd", [2**64 - 1], [bits32(2.0**64)]),
        ("cvt.s64.s32", "rd", "r", [0xFFFFFFFE, 5], [-2, 5]),
        ("cvt.u64.u32", "rd", "r", [0xFFFFFFFE], [0xFFFFFFFE]),
        ("cvt.s64.s8", "rd", "rs", [0x80, 0x17F], [-128, 127]),
        ("cvt.u32.u64", "r", "rd", [2**40 + 3], [3]),
    ],
)
def test_conversions(name, output, kind, values, expected):
    width = 1 << (64 if output == "rd" else 32)
    assert compute(name, output, (kind, values)) == [value % width for value in expected]


@pytest.mark.parametrize(
    ("instruction", "values", "expected"),
    [
        ("bfe.u32, 4, 8", [0x12345678], [0x67]),
        ("bfe.s32, 4, 4", [0x12345678, 0xF0], [7, 0xFFFFFFFF]),
        ("prmt.b32, 0x11223344, 0x5410", [0xAABBCCDD], [0x3344CCDD]),
        ("prmt.b32, 0, 0x8888", [0x80], [0xFFFFFFFF]),
        ("shf.l.wrap.b32, 0xF0000000, 4", [0x80000000], [0x8]),
        ("popc.b32", [0xF0F0], [8]),
        ("clz.b32", [1, 0], [31, 32]),
    ],
)
def test_bits_and_bytes(instruction, values, expected):
    assert compute(instruction, "r", ("r", values)) == expected


@pytest.mark.parametrize(
    ("instruction", "source"),
    [
        ("shfl.sync.bfly.b32, 4, 31, -1", lambda lane: lane ^ 4),
        ("shfl.sync.idx.b32, 5, 31, -1", lambda lane: 5),
        ("shfl.sync.up.b32, 3, 0, -1", lambda lane: max(lane - 3, 0) if lane >= 3 else lane),
        ("shfl.sync.down.b32, 3, 31, -1", lambda lane: lane + 3 if lane + 3 < 32 else lane),
        ("shfl.sync.bfly.b32, 1, 0x1c1f, -1", lambda lane: lane ^ 1),
    ],
)
def test_shuffles(instruction, source):
    assert compute(instruction, "r", ("r", range(32))) == [source(lane) for lane in range(32)]


def test_lanes_that_branch_apart_meet_again():
    out = torch.zeros(32, dtype=torch.int32)
    body = """
    mad.wide.u32 %rd1, %r0, 4, %rd0;
    and.b32 %r1, %r0, 1;
    setp.eq.b32 %p1, %r1, 0;
    mov.b32 %r2, 0;
    @%p1 bra $EVEN;
    add.s32 %r2, %r2, 10;
    bra $END;
    $EVEN:
    add.s32 %r2, %r2, 20;
    $END:
    shfl.sync.bfly.b32 %r3, %r2, 1, 31, -1;
    st.global.b32 [%rd1], %r3;
    """
    assert run(body, out) == []
    assert out.tolist() == [10, 20] * 16


def test_matrices_travel_through_shared_memory_and_are_transposed():
    out = torch.zeros(32, dtype=torch.int32)
    body = """
    shl.b32 %r1, %r0, 4;
    and.b32 %r1, %r1, 112;
    add.s32 %r2, %r0, %r0;
    add.s32 %r3, %r2, 1;
    shl.b32 %r3, %r3, 16;
    or.b32 %r2, %r2, %r3;
    stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r1], {%r2};
    ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%r4}, [%r1];
    mad.wide.u32 %rd1, %r0, 4, %rd0;
    st.global.b32 [%rd1], %r4;
    """
    assert run(body, out, shared_bytes=128) == []
    matrix = torch.arange(64, dtype=torch.int16).view(8, 8)
    assert torch.equal(out.view(torch.int16).view(8, 8), matrix.T)


# ------------------------------------------------------------------------------------------------------------- faults


def kinds(*arguments, **options) -> list[str]:
    return [finding.kind for finding in run(*arguments, **options)]


def test_threads_that_wait_at_different_barriers():
    body = """
    setp.lt.u32 %p1, %r0, 32;
    @%p1 bra $FIRST;
    bar.sync 0;
    bra $END;
    $FIRST:
    bar.sync 0;
    $END:
    """
    assert kinds(body, warps=2) == ["divergent barrier"]


def test_a_shuffle_from_a_lane_that_takes_no_part():
    body = "setp.lt.u32 %p1, %r0, 16;\n@%p1 shfl.sync.bfly.b32 %r1, %r0, 16, 31, -1;"
    assert kinds(body) == ["inactive lane"]


def test_misaligned_shared_memory():
    assert kinds("shl.b32 %r1, %r0, 2;\nst.shared.b32 [%r1+2], %r0;", shared_bytes=256) == ["shared memory misaligned"]


def test_threads_of_one_store_that_disagree_in_shared_memory():
    assert kinds("mov.b32 %r1, global_smem;\nst.shared.b32 [%r1], %r0;", shared_bytes=64) == ["race in shared memory"]
    assert kinds("mov.b32 %r1, 0;\nst.shared.b32 [%r1], %r1;", shared_bytes=64) == []


def test_threads_that_wait_for_others_that_have_ended():
    body = "setp.lt.u32 %p1, %r0, 40;\n@%p1 ret;\nbar.sync 0;"
    (finding,) = run(body, warps=2)
    assert finding.kind == "divergent barrier"
    assert "while others have ended" in finding.message


LOOP = "mov.b32 %r1, 0;\n$AGAIN:\nadd.s32 %r1, %r1, 1;\nsetp.lt.u32 %p1, %r1, {n};\n@%p1 bra $AGAIN;"


def test_a_program_that_does_not_end():
    assert kinds("$AGAIN:\nadd.s32 %r1, %r1, 1;\nbra $AGAIN;", most_instructions=1000) == ["endless"]
    assert kinds(LOOP.format(n=900), most_instructions=1000) == ["endless"]
    assert kinds(LOOP.format(n=100), most_instructions=1000) == []


def test_a_paused_program_goes_on_where_it_was(monkeypatch):
    monkeypatch.setattr(machine, "SLICE", 100)
    out = torch.zeros(3 * 64, dtype=torch.int32)
    place = "mov.u32 %r3, %ctaid.x;\nmad.lo.s32 %r4, %r3, 64, %r0;\nmad.wide.s32 %rd1, %r4, 4, %rd0;\n"
    body = f"{LOOP.format(n=500)}\nbar.sync 0;\n{place}st.global.b32 [%rd1], %r1;"
    assert kinds(body, out, warps=2, grid=(3, 1, 1)) == []
    assert out.tolist() == [500] * 192


def test_each_thread_has_memory_of_its_own():
    body = (
        ".local .align 4 .b8 __local_depot0[24];\nmov.b64 %rd1, __local_depot0;\n"
        "st.local.b32 [%rd1+4], %r0;\nld.local.b32 %r1, [%rd1+4];\n"
        "mad.wide.u32 %rd2, %r0, 4, %rd0;\nst.global.b32 [%rd2], %r1;"
    )
    out = torch.zeros(64, dtype=torch.int32)
    assert kinds(body, out, warps=2) == []
    assert out.tolist() == list(range(64))
    assert set(kinds(body.replace("+4", "+24"), out)) == {"out of bounds"}


def test_a_thread_chooses_a_parameter_by_its_address():
    """A compiler makes this of a choice between two arguments."""
    body = (
        "mov.b64 %rd4, kernel_param_1;\nmov.b64 %rd5, kernel_param_2;\nsetp.lt.u32 %p0, %r0, 40;\n"
        "selp.b64 %rd6, %rd4, %rd5, %p0;\nld.param.b64 %rd7, [%rd6];\n"
        "ld.global.b32 %r1, [%rd7];\nmad.wide.u32 %rd8, %r0, 4, %rd0;\nst.global.b32 [%rd8], %r1;"
    )
    out, first, second = (torch.full((count,), value, dtype=torch.int32) for count, value in ((64, 0), (1, 5), (1, 7)))
    assert kinds(body, out, first, second, warps=2) == []
    assert out.tolist() == [5] * 40 + [7] * 24


def test_fused_products_of_narrow_types_are_rounded_once():
    bfloat16, half = (3.0, 87.0, 2.0**-20), (1 + 2**-10, 1 + 2**-10, 2.0**-24)

    def fused(dtype: torch.dtype, values: tuple[float, ...]) -> float:
        words = [("rs", [int(torch.tensor(v, dtype=dtype).view(torch.int16))]) for v in values]
        (word,) = compute(f"fma.rn.{'bf16' if dtype is torch.bfloat16 else 'f16'}", "rs", *words)
        return torch.tensor(word, dtype=torch.int32).to(torch.int16).view(dtype).item()

    assert fused(torch.bfloat16, bfloat16) == 262  # 261 lies in the middle: what is added decides
    assert fused(torch.bfloat16, (3.0, 87.0, -(2.0**-20))) == 260
    assert fused(torch.bfloat16, (3.0, 87.0, 0.0)) == 260
    assert fused(torch.bfloat16, (3.0, 87.0, 2.0**-120)) == 262  # also where a double loses it
    assert fused(torch.float16, half) == torch.tensor(half[0] ** 2 + half[2], dtype=torch.float16).item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("name", "compute_pair"), [("add", torch.add), ("sub.rn", torch.sub), ("mul", torch.mul)])
def test_pairs_of_narrow_numbers(name, compute_pair, dtype):
    a, b = torch.tensor([[1.0, -3.5], [0.1, 7.0]]).to(dtype), torch.tensor([[2**-9, 1000.0], [-0.1, 3e-5]]).to(dtype)
    kind = "bf16x2" if dtype is torch.bfloat16 else "f16x2"
    words = [("r", [word % (1 << 32) for word in pairs.view(torch.int32).flatten().tolist()]) for pairs in (a, b)]
    expected = compute_pair(a, b).view(torch.int32).flatten().tolist()
    assert compute(f"{name}.{kind}", "r", *words) == [word % (1 << 32) for word in expected]


def test_an_overrun_never_leads_into_another_tensor():
    """Whatever the distance, the access belongs to the tensor whose address it was computed from."""
    first, second = torch.zeros(16), torch.zeros(16)
    for distance in (-4, 64, 68, 1 << 20, 1 << 40, -(1 << 40), second.data_ptr() - first.data_ptr()):
        body = (
            "setp.eq.b32 %p1, %r0, 0;\n"
            f"mov.b64 %rd2, {distance};\nadd.s64 %rd3, %rd0, %rd2;\n@%p1 st.global.b32 [%rd3], %r0;"
        )
        (finding,) = run(body, first, second)
        assert (finding.kind, finding.argument, finding.offset) == ("out of bounds", "t0", distance)
    assert not second.any()


def test_the_distance_between_two_tensors_is_no_round_number():
    first, second = torch.zeros(16), torch.zeros(16)
    for distance in (1 << 44, -(1 << 44), 1 << 45, 3 << 43):
        body = f"mov.b64 %rd2, {distance};\nadd.s64 %rd3, %rd1, %rd2;\nld.global.b32 %r1, [%rd3];"
        assert kinds(body, first, second, first, second.clone()) == ["out of bounds"]


def test_an_address_of_no_tensor():
    (finding,) = run("mov.b64 %rd3, 4096;\nld.global.b32 %r1, [%rd3];", torch.zeros(1))
    assert (finding.kind, finding.argument) == ("out of bounds", "")
    assert "at 0x1000, an address in no tensor argument" in finding.message


def test_accesses_of_different_widths_are_told_apart_to_the_byte():
    """Two programs write neighbouring bytes of one word: no race. One reads the word: a race."""
    write = "mov.u32 %r1, %ctaid.x;\ncvt.u64.u32 %rd1, %r1;\nadd.s64 %rd1, %rd0, %rd1;\ncvt.u16.u32 %rs1, %r1;\n"
    guard = "setp.eq.b32 %p1, %r0, 0;\n"
    words = torch.zeros(1, dtype=torch.int32)
    assert kinds(f"{write}{guard}@%p1 st.global.b8 [%rd1], %rs1;", words, grid=(4, 1, 1)) == []
    assert words.item() == 0x03020100
    body = f"{write}{guard}@%p1 st.global.b8 [%rd1], %rs1;\n@%p1 ld.global.b32 %r2, [%rd0];"
    assert "race between programs" in kinds(body, words, grid=(4, 1, 1))


@pytest.mark.parametrize(
    "statement",
    [
        "cp.async.ca.shared.global [%r1], [%rd0], 4;",
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%r1}, {%r2}, {%r3}, {%r4};",
        "barrier.cluster.arrive.aligned;",
        "bar.sync 1, 64;",
        "add.s32 %rd1, %r0, %r0;",
        "ld.b32 %r1, [%rd0];",
        "mov.b64 %rd1, a_variable;",
    ],
)
def test_what_the_machine_has_not_is_refused_by_name(statement):
    with pytest.raises(UnsupportedInstruction) as refusal:
        Program(kernel_of(statement, 1), 1, 0)
    name = statement.removesuffix(";")
    assert f"kernel: the virtual GPU does not run `{name}`, at kernel.py:7" in str(refusal.value)

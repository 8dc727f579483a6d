"""Reading of machine code, on short texts as nvdisasm prints them, and on one kernel that is compiled."""

from __future__ import annotations

from pathlib import Path

import pytest

from flashsim.gpu.compile import Call, Compiled, Tensor, compile_call
from flashsim.gpu.sass import Code, Group, Mma, mma_of, parse

SAMPLES = str(Path(__file__).with_name("audit_samples.py"))


def code(*lines: str) -> Code:
    """Instructions and labels; addresses are added."""
    text, address = [".text.kernel:"], 0
    for line in lines:
        if line.endswith(":"):
            text.append(line)
        else:
            predicate, _, rest = line.partition(" ") if line.startswith("@") else ("", "", line)
            text.append(f"        /*{address:04x}*/  {predicate:>10} {rest} ;")
            address += 16
    return parse("\n".join(text))


def test_instructions() -> None:
    first, second = code("@!P3 HMMA.16816.F32 R160, R12.reuse, R162, R112", "EXIT").instructions
    assert (first.address, first.opcode, first.predicate) == (0, "HMMA.16816.F32", "!P3")
    assert first.name == "HMMA"
    assert first.args == ["R160", "R12.reuse", "R162", "R112"]
    assert (second.address, second.name, second.predicate, second.operands) == (16, "EXIT", "", "")


def test_what_is_never_executed_is_left_out() -> None:
    names = [i.name for i in code("@!PT LDS RZ, [RZ]", "@PT MOV R1, R2", "EXIT").instructions]
    assert names == ["MOV", "EXIT"]


def test_no_machine_code() -> None:
    with pytest.raises(ValueError, match="no machine code"):
        parse(".target sm_90a\n")


WAIT_BEHIND_THE_END = (
    "MOV R1, R2",
    ".L_x_8:",
    "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR47+0x280e0], R12",
    "@!P0 BRA `(.L_x_5)",
    ".L_x_29:",
    "MUFU.EX2 R3, R4",
    "@P2 BRA `(.L_x_8)",
    "EXIT",
    ".L_x_5:",
    "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR47+0x280e0], R12",
    "@!P0 BRA `(.L_x_5)",
    "BRA `(.L_x_29)",
)


def test_a_retry_loop_belongs_to_the_loop_that_it_was_moved_out_of() -> None:
    (loop,) = code(*WAIT_BEHIND_THE_END).loops
    assert loop.counts["SYNCS"] == 2
    assert [i.name for i in loop.instructions][:3] == ["SYNCS", "BRA", "MUFU.EX2"]
    assert loop.counts["EXIT"] == 0


def test_only_innermost_loops_with_work() -> None:
    found = code(
        ".L_x_0:",  # a persistent loop around all
        "UTMALDG.2D [UR4], [UR6]",
        ".L_x_1:",
        "MUFU.EX2 R3, R4",
        "@P0 BRA `(.L_x_1)",
        ".L_x_2:",
        "HMMA.16816.F32 R0, R4, R8, R0",
        "@P1 BRA `(.L_x_2)",
        "BRA.U UP0, `(.L_x_0)",
        ".L_x_3:",
        "ISETP.NE.AND P0, PT, R1, RZ, PT",  # waits, does nothing
        "@P0 BRA `(.L_x_3)",
        "EXIT",
    )
    assert [set(loop.counts) - {"BRA"} for loop in found.loops] == [{"MUFU.EX2"}, {"HMMA"}]


def test_a_loop_that_is_left_by_a_call() -> None:
    (loop,) = code(
        ".L_x_1:", "MUFU.EX2 R3, R4", "@!P3 CALL.REL.NOINC `(.L_x_0)", "BRA `(.L_x_1)", ".L_x_0:", "EXIT"
    ).loops
    assert loop.counts["MUFU.EX2"] == 1


def test_roles_behind_a_jump_table() -> None:
    found = code(
        '.L_x_9:',
        'BRX R2 -0x10 (*"BRANCH_TARGETS .L_x_1,.L_x_2"*)',
        ".L_x_1:",
        "UTMALDG.2D [UR4], [UR6]",
        "@P0 BRA `(.L_x_1)",
        "BRA `(.L_x_9)",
        ".L_x_2:",
        "MUFU.EX2 R3, R4",
        "@P0 BRA `(.L_x_2)",
        "BRA `(.L_x_9)",
    )  # fmt: skip
    assert [loop.counts["UTMALDG"] for loop in found.loops] == [1, 0]


@pytest.mark.parametrize(
    ("instruction", "shape"),
    [
        ("HMMA.16816.F32 R0, R4, R8, R0", Mma(16, 8, 16, "warp")),
        ("HMMA.16816.F32.BF16 R0, R4, R8, R0", Mma(16, 8, 16, "warp")),
        ("HMMA.1688.F32.TF32 R0, R4, R8, R0", Mma(16, 8, 8, "warp")),
        ("QMMA.16832.F32.E4M3.E4M3 R0, R4, R8, R0", Mma(16, 8, 32, "warp")),
        ("HGMMA.64x128x16.F32 R24, gdesc[UR8], R24, gsb0", Mma(64, 128, 16, "warpgroup")),
        ("QGMMA.64x96x32.F32.E4M3.E4M3 R24, R4, gdesc[UR8], R24", Mma(64, 96, 32, "warpgroup")),
    ],
)
def test_shapes(instruction: str, shape: Mma) -> None:
    (i, _) = code(instruction, "EXIT").instructions
    assert mma_of(i, ()) == shape
    assert mma_of(i, ()).flop == 2 * shape.m * shape.n * shape.k


def test_the_shape_of_tcgen05_is_in_its_descriptor() -> None:
    found = code(
        "UMOV UR27, 0x8210010",
        "UTCHMMA tmem[UR37], gdesc[UR20], tmem[UR8], tmem[UR26], idesc[UR27], UPT",
        "UMOV UR41, 0x8100010",
        "UTCHMMA gdesc[UR14], gdesc[UR18], tmem[UR9], tmem[UR40], idesc[UR41], !UPT",
        "EXIT",
    )
    first, second = (i for i in found.instructions if i.name == "UTCHMMA")
    assert found.mma(first) == Mma(128, 128, 16, "cta")
    assert found.mma(second) == Mma(128, 64, 16, "cta")
    assert found.mma(first).shared_bytes(first) == 32 * 128  # A is in tensor memory
    assert found.mma(second).shared_bytes(second) == 32 * (128 + 64)


def test_a_shape_that_cannot_be_told() -> None:
    found = code("UTCHMMA gdesc[UR14], gdesc[UR18], tmem[UR9], tmem[UR40], idesc[UR41], !UPT", "EXIT")
    with pytest.raises(ValueError, match="UTCHMMA"):
        found.mma(found.instructions[0])


def test_widths() -> None:
    names = ["LDGSTS.E.BYPASS.128 [R5], desc[UR16][R90.64], !P3", "LDG.E.64 R2, desc[UR4][R2.64]", "LDG.E R2, [R2.64]"]
    names += ["LDG.E.U16 R2, desc[UR4][R2.64]", "LDSM.16.M88.4 R4, [R5]", "LDS.128 R4, [R5]", "STS R4, [R5]"]
    found = code(*names, "STSM.16.M88 [R1], R2", "EXIT").instructions
    assert [i.load_width for i in found] == [16, 8, 4, 2, 0, 0, 0, 0, 0]
    assert [i.shared_bytes for i in found] == [512, 0, 0, 0, 512, 512, 128, 128, 0]


def test_wgmma_reads_shared_memory() -> None:
    both, one, _ = code(
        "HGMMA.64x128x16.F32 R24, gdesc[UR8], R24", "HGMMA.64x128x16.F32 R24, R4, gdesc[UR8].tnspB, R24", "EXIT"
    ).instructions
    assert mma_of(both, ()).shared_bytes(both) == 32 * (64 + 128)
    assert mma_of(one, ()).shared_bytes(one) == 32 * 128


def test_kinds() -> None:
    loop = code(
        "MUFU.EX2 R1, R2", "MUFU.RCP R1, R2", "FFMA R1, R2, R3, R4", "FFMA2 R2, R4, R6, R8", "FADD R1, R2, R3",
        "F2FP.F16.F32.PACK_AB R1, R2, R3", "FMNMX R1, R2, R3, !PT", "IMAD.MOV.U32 R1, RZ, RZ, R2", "LDL R1, [R1]",
        "HMMA.16816.F32 R0, R4, R8, R0", "EXIT",
    ).whole()  # fmt: skip
    assert {kind: loop.kind(kind) for kind in ("exp", "fma", "convert", "alu")} == {
        "exp": 1,
        "fma": 4,
        "convert": 1,
        "alu": 2,
    }
    assert loop.other == 3  # RCP, LDL, EXIT
    assert loop.spills == 1


def test_masked() -> None:
    exps = ["MUFU.EX2 R1, R2"] * 4
    assert not code(*exps, "FSEL R1, R2, R3, P0", "EXIT").whole().masked
    assert code(*exps, *["FSEL R1, R2, R3, P0"] * 4, "EXIT").whole().masked


QK = (
    "WARPGROUP.ARRIVE",
    "HGMMA.64x8x16.F32 R24, gdesc[UR12], RZ, !UPT",
    "HGMMA.64x8x16.F32 R24, gdesc[UR12], R24, gsb0",
)
PV = ("WARPGROUP.ARRIVE", "HGMMA.64x16x16.F32 R64, R4, gdesc[UR8].tnspB, R64, gsb0")
EXPS = ("MUFU.EX2 R1, R2",) * 3


def wait(left: int) -> str:
    return f"WARPGROUP.DEPBAR.LE gsb0, {left:#x}"


@pytest.mark.parametrize(
    ("body", "exps", "left"),
    [
        ((*QK, *PV, wait(1), *EXPS, wait(0)), (0, 3), (1, 0)),
        ((*QK, *PV, wait(1), wait(0), *EXPS), (0, 0), (1, 0)),
        ((*QK, wait(0), *EXPS, *PV, wait(0)), (0, 0), (0, 0)),
        # P V is awaited in the next turn, after its softmax: both groups complete at the only wait.
        ((*QK, *EXPS, wait(0), *PV), (3, 3), (0, 0)),
        # ... and here before it.
        ((*QK, wait(0), *EXPS, *PV), (0, 0), (0, 0)),
    ],
)
def test_what_overlaps(body: tuple[str, ...], exps: tuple[int, ...], left: tuple[int, ...]) -> None:
    (loop,) = code(".L_x_1:", *body, "@P0 BRA `(.L_x_1)", "EXIT").loops
    groups = loop.groups()
    assert sorted(group.exps for group in groups) == sorted(exps)
    assert sorted(group.left for group in groups) == sorted(left)
    assert {(group.mmas, group.flop) for group in groups} == {(2, 2 * 2 * 64 * 8 * 16), (1, 2 * 64 * 16 * 16)}


def test_products_that_nobody_awaits_in_the_loop() -> None:
    (loop,) = code(".L_x_1:", *QK, *EXPS, "@P0 BRA `(.L_x_1)", "EXIT").loops
    assert loop.groups() == ()


def test_a_group_is_a_value() -> None:
    (loop,) = code(".L_x_1:", *PV, *EXPS, wait(0), "@P0 BRA `(.L_x_1)", "EXIT").loops
    assert loop.groups() == (Group(mmas=1, flop=2 * 64 * 16 * 16, exps=3, left=0),)


def arrival(*before: str) -> int | None:
    found = code(
        *before, ".L_x_1:", "UTMALDG.2D [UR4], [UR6]", "@!P0 SYNCS.ARRIVE.TRANS64 RZ, [UR9+0x280e0], R4",
        "SYNCS.ARRIVE.TRANS64.A1T0 RZ, [UR9+0x280f0], RZ", "@P1 BRA `(.L_x_1)", "EXIT",
    )  # fmt: skip
    return found.expected_bytes(found.loops[0])


def test_bytes_that_a_barrier_expects() -> None:
    assert arrival("@!P0 MOV R4, 0x8000") == 32768
    assert arrival("IMAD.MOV.U32 R4, RZ, RZ, 0x4000") == 16384
    assert arrival("HFMA2 R4, -RZ, RZ, 0, -0") == 32768
    assert arrival("MOV R4, 0x8000", "IADD3 R4, R4, R5, RZ") is None
    assert arrival("MOV R4, R7") is None
    assert arrival() is None


@pytest.fixture(scope="module")
def compiled() -> Compiled:
    x = Tensor((1024, 128))
    found = compile_call(Call(f"{SAMPLES}:attention", {"q": x, "k": x, "v": x}), 90)
    assert isinstance(found, tuple), found
    return found[0]


def test_a_compiled_kernel(compiled: Compiled) -> None:
    (loop,) = compiled.code.loops
    shapes = {compiled.code.mma(i) for i in loop.instructions if i.name == "HGMMA"}
    assert shapes == {Mma(64, 64, 16, "warpgroup"), Mma(64, 128, 16, "warpgroup")}
    # Each of two warpgroups: 128 / 16 steps of S, 64 / 16 of O.
    assert loop.counts["HGMMA"] == 8 + 4
    # 128 x 64 scores of 256 threads, and a factor for each of two rows.
    assert loop.counts["MUFU.EX2"] == 32 + 2
    assert sum(i.load_width for i in loop.instructions) * 256 == 2 * 64 * 128 * 2
    assert sum(group.flop for group in loop.groups()) * 2 == 2 * 2 * 128 * 64 * 128

"""The loops of a kernel's roles, put together: on machine code and TTGIR as short as they can be."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from flashsim.gpu.compile import Compiled
from flashsim.gpu.inner_loops import LoopReport, loop_report, turns_of
from flashsim.gpu.kernels import Need

EXP, SELECT = "MUFU.EX2 R1, R2", "FSEL R1, R2, R3, P0"
QK = "HGMMA.64x64x16.F32 R24, gdesc[UR8], R24, gsb0"
WAIT = "WARPGROUP.DEPBAR.LE gsb0, 0x0"
COPY = ("UTMALDG.2D [UR4], [UR6]", "MOV R4, 0x1000", "SYNCS.ARRIVE.TRANS64 RZ, [UR9], R4")
CONSUMER, PRODUCER = (
    "%0 = ttng.warp_group_dot %a\n%1 = math.exp2 %s : tensor<64x64xf32>",
    "ttng.async_tma_copy_global_to_local",
)


def kernel(loops: Sequence[Sequence[str]], roles: Sequence[tuple[int, str]], num_warps: int = 4) -> Compiled:
    """`loops` one after the other; `roles`: warps and TTGIR of the partitions, the first being the default one."""
    lines, address = [], 0
    for number, loop in enumerate(loops):
        lines.append(f".L_x_{number}:")
        for instruction in (*loop, f"@P1 BRA `(.L_x_{number})", "EXIT" if number + 1 == len(loops) else "NOP"):
            predicate, _, rest = instruction.rpartition(" BRA ")
            lines.append(f"  /*{address:04x}*/ {f'{predicate} BRA {rest}' if predicate else instruction} ;")
            address += 16
    texts = [f"    partition{i}(%arg0) num_warps({warps}) {{\n{text}" for i, (warps, text) in enumerate(roles[1:])]
    ttgir = "\n".join(["    default {", roles[0][1], *texts]) if texts else roles[0][1]
    return Compiled(
        kernel="k", target=90, grid=(1,), constants={}, types={}, num_warps=num_warps, total_warps=0, num_stages=2,
        shared=0, tmem=0, registers=0, stack=0, ptx="", ttgir=ttgir, sass="\n".join(lines), cubin=b"", version="",
    )  # fmt: skip


PRODUCTS, SOFTMAX = Need(1, 1, None), Need(0, 1, None)


def reports(compiled: Compiled, need: Need = PRODUCTS) -> list[LoopReport]:
    return [loop_report(compiled, turn, need, None) for turn in turns_of(compiled, need)]


SPECIALIZED = [(4, CONSUMER), (4, CONSUMER), (1, PRODUCER)]


def test_roles() -> None:
    compiled = kernel([[EXP]], SPECIALIZED)
    assert [(role.warps, role.features, role.exps) for role in compiled.roles] == [
        (4, {"mma", "exp"}, 64 * 64),
        (4, {"mma", "exp"}, 64 * 64),
        (1, {"tma"}, 0),
    ]


def test_consumers_and_producer_are_one_turn() -> None:
    (report,) = reports(kernel([[QK, WAIT, EXP], COPY, [QK, EXP, WAIT]], SPECIALIZED))
    assert report.mma == {"HGMMA": 2}
    assert report.flop == 2 * 2 * 64 * 64 * 16
    assert report.exps == 2 * 128
    assert report.bytes == 4096
    assert report.counts["tma"] == 1
    assert report.computing_warps == 8
    assert report.per_warp["exp"] == 1
    assert (report.exps_in_flight, report.exps_in_loop, report.overlap) == (0, 1, "absent")  # of one of them


def test_loops_for_masked_tiles_are_turns_of_their_own() -> None:
    whole, masked = [QK, WAIT, EXP], [QK, WAIT, EXP, SELECT]
    first, second = reports(kernel([masked, whole, COPY, masked, whole], SPECIALIZED))
    assert (first.masked, second.masked) == (True, False)
    assert first.exps == second.exps == 2 * 128
    assert first.bytes == second.bytes == 4096  # one loop of the producer for both


def test_without_roles_every_loop_is_a_turn() -> None:
    found = reports(kernel([[EXP], [QK, WAIT, EXP], [QK, WAIT, EXP, SELECT]], [(8, CONSUMER)], num_warps=8))
    assert [report.masked for report in found] == [False, True]
    assert found[0].flop == 2 * 2 * 64 * 64 * 16
    (softmax,) = reports(kernel([[EXP]], [(8, CONSUMER)], num_warps=8), SOFTMAX)
    assert softmax.exps == 8 * 32


def test_a_kernel_without_loops_is_one_turn() -> None:
    compiled = kernel([[QK, WAIT]], [(4, CONSUMER)])
    straight = compiled.sass.replace("@P1 BRA `(.L_x_0)", "NOP")
    (report,) = reports(Compiled(**{**vars(compiled), "sass": straight}))
    assert report.mma == {"HGMMA": 1}


def test_roles_that_differ_in_warps_only() -> None:
    """On Blackwell: the softmax's warps, and those that rescale O, have nothing but exponentials."""
    few, many = "%0 = math.exp2 %a : tensor<128xf32>", "%0 = math.exp2 %a : tensor<128x64xf32>"
    roles = [(8, many), (4, few), (1, PRODUCER)]
    (report,) = reports(kernel([[EXP], COPY, [EXP] * 33], roles, num_warps=8), SOFTMAX)
    assert report.exps == 32 * (8 * 33 + 4 * 1)
    loops, roles = [[EXP], [EXP], COPY, [QK], [QK], [EXP], [EXP]], [*roles, (1, CONSUMER.splitlines()[0])]
    with pytest.raises(ValueError, match="cannot be told apart"):
        reports(kernel(loops, roles, num_warps=8))


@pytest.mark.parametrize(
    ("loops", "message"),
    [
        ([[QK, EXP], COPY], "1 inner loops with exp, mma do not divide among 2 roles"),
        ([[QK, EXP], [QK, EXP], COPY, COPY], "a role with tma has 2 inner loops, one with products 1"),
        ([[QK, EXP], [QK, EXP], [*COPY, EXP]], "no role of the kernel has what an inner loop has: exp, tma"),
        ([[QK, EXP], [QK, EXP], [*COPY[:1], "MOV R4, R5", COPY[2]]], "expects are no constant"),
    ],
)
def test_what_cannot_be_counted(loops: list[list[str]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        reports(kernel(loops, SPECIALIZED))

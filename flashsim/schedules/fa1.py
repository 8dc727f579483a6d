"""FlashAttention-1, forward (Dao et al., arXiv 2205.14135, algorithm 1; algorithm 5 with a mask that skips blocks).

One CTA for each head of each batch entry: an outer loop over the blocks of keys, an inner loop over the blocks of
queries, so that O_i and its statistics go through HBM at every step. The warps split the *keys*: at every step they
exchange maxima and sums of rows, and sum up their partial O, through shared memory. `fa1_backward` has the backward
pass.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

from flashsim.problem import AttentionProblem, num_k_tiles
from flashsim.schedules.base import Grid, Kernel, Role, Schedule, switch
from flashsim.schedules.fa1_backward import ROWS_AT_ONCE, FA1Backward, begins_alike, no_memory, parts_of, share
from flashsim.schedules.fa1_triton import FA1Triton
from flashsim.schedules.launch import PUBLISHED, launch_parameters
from flashsim.schedules.tensors import Tensor
from flashsim.schedules.verbs import CTA, Operand, Program, Registers, Sync, Warpgroup

WARPS = 4
SRAM_BYTE = {"ampere": 96 * 1024, "ada": 24 * 1024, "hopper": 96 * 1024}
"""M of the paper's build: half of A100's 192 KiB on an SM (the paper's section 2.1; the rest is for what the warps
exchange), and less on parts whose CTAs have 99 KiB. Chosen."""
OTHER_INSTRUCTIONS = 60
"""Of a warp per step, beside those of the verbs. Assumed to be as many as in FlashAttention-2's loop."""
O_TMP = {"O_tmp": Tensor("queries", "head_dim_v", "fp32")}


@dataclass
class Shared:
    """What the warps of one CTA share: of `maxima` and `sums`, each has a column, of `O` a tile."""

    Q: list[Operand]
    K: Operand
    V: Operand
    maxima: Operand
    sums: Operand
    O: list[Operand]  # noqa: E741 - the paper's name
    everybody: Sync


@dataclass
class Fragments:
    """The register tiles of one warp: first what it computes of all rows with its keys, then its rows of O."""

    K: Operand
    V: Operand
    S: Operand
    P: Operand
    O_part: Operand
    m_part: Operand
    l_part: Operand
    m: Operand
    O: Operand  # noqa: E741 - the paper's name
    L: Operand
    alpha: Operand
    l: Operand  # noqa: E741 - the paper's name
    scale: Operand


@dataclass
class Rows:
    """The register tiles of the kernels before and after."""

    O: Operand  # noqa: E741 - the paper's name
    L: Operand


def paper_tile(head_dim: int, sram_byte: int) -> tuple[int, int]:
    """(B_r, B_c) of algorithm 1, line 1: B_c = ceil(M / 4d) keys and B_r = min(B_c, d) rows, but at most 64.

    Rounded down to multiples of 64, which the warps can share, and of 16, one MMA, but at least one of them.
    """
    B_c = -(-sram_byte // 2 // (4 * head_dim))
    keys = max(1, B_c // 64) * 64
    return max(1, min(B_c, keys, head_dim, 64) // 16) * 16, keys


def code_tile(problem: AttentionProblem, backward: bool, architecture: str) -> tuple[int, int]:
    """(rows, keys) as csrc/flash_attn/src/fmha_fwd_launch_template.h and fmha_bwd_launch_template.h of 2022 have them.

    Backward, parts with less shared memory than A100 have 128 keys; at head dim 128 the code refuses them, 64 keys fit.
    """
    small = backward and architecture == "ada"
    if max(problem.head_dim, problem.head_dim_v) > 64:
        return 16, 64 if small else 128
    return 16, 128 if small or problem.seqlen_k <= 128 else 256


@dataclass(frozen=True)
class FA1(Schedule):
    """FlashAttention-1, fp16 and bf16, Ampere, Ada and Hopper, head dims up to 128."""

    title = "FlashAttention-1: O and its statistics go through HBM at every step, warps split the keys"
    source = "arXiv 2205.14135, algorithms 1, 4 and 5; Dao-AILab/flash-attention of 2022, csrc/flash_attn/src/fmha*"
    directions = ("fwd", "bwd", "fwd+bwd")
    dropout = True
    backward: ClassVar[type[FA1Backward]] = FA1Backward
    triton: ClassVar[type[FA1Triton]] = FA1Triton

    impl: str = switch(PUBLISHED, "whose kernel; triton: kernels/fa1.py, with its tiles", (PUBLISHED, "triton"))
    mma: str = switch(None, "of impl=triton: instruction of the products", ("mma.sync", "wgmma"))
    num_warps: int = switch(None, "of impl=triton: warps of a CTA")
    bwd_BLOCK_M: int = switch(None, "query rows of a tile of the backward pass")
    bwd_BLOCK_N: int = switch(None, "keys of a block in the backward pass")
    build: str = switch(
        "2022-05",
        "paper: B_c = ceil(M / 4d) keys, B_r = min(B_c, d) queries, O and dQ in the problem's dtype; "
        "2022-05: the code, 16 queries, 128 or 256 keys, O and dQ in fp32 until they are complete",
        choices=("paper", "2022-05"),
    )

    def defaults(self, problem: AttentionProblem, architecture: str) -> dict[str, Any]:
        if self.build == "paper":
            sram, head_dim = SRAM_BYTE[architecture], self.padded(max(problem.head_dim, problem.head_dim_v))
            forward = paper_tile(head_dim, sram)
            backward = paper_tile(head_dim, sram // 2 if problem.dropout else sram)  # its mask takes registers
        else:
            forward, backward = (code_tile(problem, backward, architecture) for backward in (False, True))
        names = ("BLOCK_M", "BLOCK_N", "bwd_BLOCK_M", "bwd_BLOCK_N")
        published = dict(zip(names, (*forward, *backward), strict=True)) | {"mma": "mma.sync", "num_warps": WARPS}
        if self.impl == PUBLISHED:
            return published
        row = launch_parameters(self.impl, "fa1_fwd", problem, architecture)
        row["mma"] = "wgmma" if architecture == "hopper" else "mma.sync"  # type: ignore[assignment]
        return published | {name: row[name] for name in ("BLOCK_M", "BLOCK_N", "mma", "num_warps")}

    def complaints(self, problem: AttentionProblem) -> list[str]:
        lines = [
            f"{name} = {width}, the kernels end at 128"
            for name, width in (("head_dim", problem.head_dim), ("head_dim_v", problem.head_dim_v))
            if width > 128 and self.impl == PUBLISHED
        ]
        for name, value, each in (
            ("BLOCK_M", self.BLOCK_M, 16),
            ("BLOCK_N", self.BLOCK_N, 64),
            ("bwd_BLOCK_M", self.bwd_BLOCK_M, 16),
            ("bwd_BLOCK_N", self.bwd_BLOCK_N, 64),
        ):
            if value % each:
                lines.append(f"{name} = {value}, must be a multiple of {each}: whole MMAs for every warp")
        if self.num_warps not in (4, 8, 16):
            return [*lines, f"num_warps = {self.num_warps}, allowed are 4, 8 and 16"]
        if self.impl == "triton":
            return lines + self.triton_kernel().complaints(problem)
        if self.mma != "mma.sync" or self.num_warps != WARPS:
            lines.append(
                f"mma = {self.mma}, num_warps = {self.num_warps}: the published kernel has mma.sync and {WARPS}"
            )
        return lines

    def triton_kernel(self) -> FA1Triton:
        # Warps beyond one for each 16 rows share columns, and are simulated as part of one warpgroup.
        return self.triton(self.BLOCK_M, self.BLOCK_N, min(self.num_warps // 4, max(1, self.BLOCK_M // 64)), self.mma)

    def padded(self, width: int) -> int:
        """Columns of the tiles: 16, 32, 64 or 128 in the code."""
        whole = -(-width // 16) * 16
        return whole if self.build == "paper" else 1 << (whole - 1).bit_length()

    def through(self, problem: AttentionProblem) -> str:
        """The tensor in which O_i goes through HBM; the code's is O itself where there is one block of keys."""
        if self.impl == "triton":
            return "O_tmp"
        return "O" if self.build == "paper" or num_k_tiles(problem, self.BLOCK_N) == 1 else "O_tmp"

    def kernels(self, problem: AttentionProblem) -> tuple[Kernel, ...]:
        d, dv = (self.padded(width) for width in (problem.head_dim, problem.head_dim_v))
        backward = self.backward(self.bwd_BLOCK_M, self.bwd_BLOCK_N, self.build, d, dv)
        launches = {"fwd": self.forward(problem, d, dv), "bwd": backward.kernels(problem)}
        return tuple(kernel for name in problem.passes for kernel in launches[name])

    def workspace_byte(self, problem: AttentionProblem) -> int:
        """O_tmp is freed before the backward pass needs dQ_tmp. A padded batch is copied without its padding first: Q,
        K and V, packed (unpad_input in flash_attn/bert_padding.py), since the kernels take sequences end to end."""
        passes = [super(FA1, self).workspace_byte(replace(problem, direction=name)) for name in problem.passes]
        unpadded = sum(problem.tensor_bytes[name] for name in ("q", "k", "v"))
        return max(passes) + (unpadded if problem.mask_rule.kind == "padding" else 0)

    def forward(self, problem: AttentionProblem, d: int, dv: int) -> list[Kernel]:
        """The launches of the forward pass.

        The code sets O and L to their neutral elements where some queries do not see the first block of keys, as
        algorithm 1 does always. Its last step writes O in place of O_tmp; here a kernel after it converts all of O_tmp.
        """
        through = self.through(problem)
        prepared = (
            self.build == "paper" or self.impl == "triton" or not begins_alike(problem, self.BLOCK_M, self.BLOCK_N)
        )
        common: dict[str, Any] = {
            "BLOCK_N": self.BLOCK_N,
            "mma": "mma.sync",
            "copy": "cp.async",
            "head_dim": d,
            "head_dim_v": dv,
            "workspace": O_TMP if through == "O_tmp" else {},
        }
        by_rows: dict[str, Any] = {"BLOCK_M": ROWS_AT_ONCE, "walk": "none", **common}
        before = Role("warps", partial(self.prepare, through=through), registers=self.query_rows)
        main = Role("warps", partial(self.program, prepared=prepared), WARPS, warps=1, registers=self.registers)
        after = Role("warps", self.convert_o, registers=self.query_rows)
        loops = Kernel(
            "fa1_fwd",
            (main,),
            self.shared,
            Grid(over="keys", launch="head"),
            self.BLOCK_M,
            overhead_instructions=OTHER_INSTRUCTIONS,
            **common,
        )
        if self.impl == "triton":
            loops = self.triton_kernel().kernel(
                problem, overhead_instructions=OTHER_INSTRUCTIONS, workspace=common["workspace"]
            )
        kernels = [
            Kernel("fa1_fwd_prepare", (before,), no_memory, Grid(), **by_rows),
            loops,
            Kernel("fa1_fwd_convert", (after,), no_memory, Grid(), **by_rows),
        ]
        return kernels[not prepared : 3 if through == "O_tmp" else 2]

    def shared(self, cta: CTA) -> Shared:
        M, N, d, dv = self.BLOCK_M, self.BLOCK_N, cta.head_dim, cta.head_dim_v
        _, width = parts_of(dv, WARPS, M)[0]
        K = cta.slot("K", (N, d))
        in_one_place = self.build != "paper" and d == dv  # the code, which keeps both in registers
        return Shared(
            Q=[cta.slot(f"Q[{n}]", (M, d)) for n in range(2)],
            K=K,
            V=K if in_one_place else cta.slot("V", (N, dv)),
            maxima=cta.slot("maxima", (M, WARPS + 1), "fp32"),
            sums=cta.slot("sums", (M, WARPS), "fp32"),
            O=[cta.slot(f"O[{n}]", (M, width), "fp32") for n in range(WARPS)],
            everybody=cta.sync("everybody", WARPS),
        )

    def registers(self, regs: Registers) -> Fragments:
        M, n, d, dv, dtype = self.BLOCK_M, self.BLOCK_N // WARPS, regs.head_dim, regs.head_dim_v, regs.problem.dtype
        _, width = parts_of(dv, WARPS, M)[0]
        in_code = self.build != "paper"
        S = regs.tile("S", (M, n))
        mine = M // WARPS
        return Fragments(
            K=regs.tile("K", (n, d), dtype) if in_code else S,
            V=regs.tile("V", (n, dv), dtype) if in_code else S,
            S=S,
            P=regs.tile("P", (M, n), dtype, over=S),
            O_part=regs.tile("O_part", (M, width)),
            m_part=regs.rows("m_part", M),
            l_part=regs.rows("l_part", M),
            m=regs.rows("m", M),
            O=regs.tile("O", (mine, dv)),
            L=regs.rows("L", mine),
            alpha=regs.rows("alpha", mine),
            l=regs.rows("l", mine),
            scale=regs.rows("scale", mine),
        )

    def program(self, wg: Warpgroup, s: Shared, r: Fragments, prepared: bool) -> Program:
        """Algorithm 1, one warp: N / 4 of the keys for S and P V, M / 4 of the rows to load, to sum up and to store.

        l and m are kept as one number, L = m + log l, as the code does: with O_i normalized, m_i = L_i and l_i = 1.
        `prepared`: O and L have been given a value before; else the first block of keys is the first to do so.
        """
        p, w = wg.problem, wg.index
        rows, keys = share(w, WARPS, self.BLOCK_M), share(w, WARPS, self.BLOCK_N)
        in_code = self.build != "paper"
        K, V = s.K.rows(*keys), s.V.rows(*keys)
        K_j, V_j = (r.K, r.V) if in_code else (K, V)
        parts = parts_of(V.shape[1], WARPS, self.BLOCK_M)
        for tile in wg.tiles():  # 5: K_j, V_j
            O = getattr(tile, self.through(p))  # noqa: E741 - the paper's name
            seen = prepared or tile.index > 0
            wg.map("fill", p.softmax_scale, into=r.scale)
            if tile.count:
                q = wg.load(tile.Q(tile.first).rows(*rows), into=s.Q[tile.first % 2].rows(*rows))
                yield wg.load(tile.K.rows(*keys), into=K)  # 6
                if in_code:
                    wg.convert(K, into=r.K)
                yield wg.load(tile.V.rows(*keys), into=V)
                if in_code:
                    wg.convert(V, into=r.V)
                yield q
                yield s.everybody.wait()  # everyone's part of Q_i is there
            for i in wg.q_tiles(tile):  # 7: Q_i
                if i < tile.last:
                    q = wg.load(tile.Q(i + 1).rows(*rows), into=s.Q[(i + 1) % 2].rows(*rows))
                if seen:  # 8
                    old = wg.load(O(i).rows(*rows), into=r.O), wg.load(tile.LSE(i).rows(*rows), into=r.L)
                yield wg.gemm(s.Q[i % 2], K_j.T, into=r.S)  # 9: S = Q_i K_j^T
                if in_code or tile.partial(i):  # the code asks of every score whether it exists
                    wg.map("mask", r.S, tile, i, 0, keys[0], into=r.S)
                wg.map("fill", float("-inf"), into=r.m_part)
                wg.reduce("max", r.S, into=r.m_part)  # 10: of its keys; of all of them and of L_i after the exchange
                wg.convert(r.m_part, into=s.maxima.columns(w, 1))
                if seen:
                    yield old[1]
                    wg.map("div", r.L, r.scale, into=r.L)
                else:
                    wg.map("fill", float("-inf"), into=r.L)
                wg.convert(r.L, into=s.maxima.columns(WARPS, 1).rows(*rows))
                yield s.everybody.wait()  # all maxima are there
                wg.map("fill", float("-inf"), into=r.m)
                wg.reduce("max", s.maxima, into=r.m)  # 11: m_new
                wg.map("exp", r.S, r.m, into=r.S)  # 10: P = exp(S - m_new)
                wg.map("fill", 0.0, into=r.l_part)
                wg.reduce("sum", r.S, into=r.l_part)
                wg.convert(r.l_part, into=s.sums.columns(w, 1))
                if p.dropout:
                    wg.map("dropout", r.S, tile, i, 0, keys[0], into=r.S)
                wg.convert(r.S, into=r.P)
                for start, columns in parts:
                    part, mine = r.O_part.columns(0, columns), r.O.columns(start, columns)
                    yield wg.gemm(r.P, V_j.columns(start, columns), into=part)  # 12: P V_j, of its keys
                    wg.convert(part, into=s.O[w].columns(0, columns))
                    if start == 0:
                        yield q
                    yield s.everybody.wait()  # all of P V_j and all sums are there, and everyone's part of Q_{i+1}
                    if start == 0:
                        m = r.m.rows(*rows)
                        wg.map("rescale_factor", r.L, m, into=r.alpha)
                        wg.map("copy", r.alpha, into=r.l)
                        wg.reduce("sum", s.sums.rows(*rows), into=r.l)  # 11: l_new
                        if seen:
                            yield old[0]
                            wg.map("mul", r.O, r.alpha, into=r.O)
                        else:
                            wg.map("fill", 0.0, into=r.O)
                    for other in s.O:
                        wg.map("add", mine, other.rows(*rows).columns(0, columns), into=mine)
                    if (start, columns) != parts[-1]:
                        yield s.everybody.wait()  # nobody reads this part any more
                wg.map("div", r.O, r.l, into=r.O)  # 12: O_i = diag(l_new)^-1 (diag(alpha) O_i + P V_j)
                wg.map("lse", m, r.l, into=r.L)
                wg.store(r.O, into=O(i).rows(*rows))
                wg.store(r.L, into=tile.LSE(i).rows(*rows))  # 13

    # O = 0 and L = -inf before, O = O_tmp after

    def query_rows(self, regs: Registers) -> Rows:
        return Rows(O=regs.tile("O", (ROWS_AT_ONCE, regs.head_dim_v)), L=regs.rows("L", ROWS_AT_ONCE))

    def prepare(self, wg: Warpgroup, s: None, r: Rows, through: str) -> Program:
        """Line 2."""
        for tile in wg.tiles():
            wg.map("fill", 0.0, into=r.O)
            wg.map("fill", float("-inf"), into=r.L)
            wg.store(r.O, into=getattr(tile, through))
            yield wg.store(r.L, into=tile.LSE)

    def convert_o(self, wg: Warpgroup, s: None, r: Rows) -> Program:
        for tile in wg.tiles():
            yield wg.load(tile.O_tmp, into=r.O)
            wg.store(r.O, into=tile.O)

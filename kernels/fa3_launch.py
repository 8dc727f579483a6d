"""Checks of what `fa3` is asked for, and what that comes to at launch."""

from typing import Any

import torch
import triton
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from flashsim_kernels.arguments import DTYPES, ArgumentError, architecture, check_attention, padded
from flashsim_kernels.launch import launch_parameters

LOG2E = 1.4426950408889634
BUILDS = ("2024-07", "2025-01")
REGISTERS = {1: (240, 56), 2: (240, 24), 3: (160, 32)}
"""Of a thread of a consumer and of the producer, by the number of consumers."""
OTHER_REGISTERS = 24
"""Of a consumer, beside its tiles."""
MAX_SHARED_BYTE = 232448
L2_SECTION_BYTE = 32 << 20
"""K and V of the heads that the longest-first order works on at a time (hopper/tile_scheduler.hpp: 32 MiB of L2)."""


def tile_and_switches(
    q: torch.Tensor, v: torch.Tensor, given: dict[str, int | bool | str | None]
) -> dict[str, int | bool | str]:
    """Every switch with its value: those of `given` that are not None, and defaults.

    Raises ArgumentError with one line for each mistake.
    """
    d, d_v = padded(q.shape[3]), padded(v.shape[3])
    table = launch_parameters("gluon", "fa3_fwd", architecture(q.device), DTYPES[q.dtype], max(q.shape[3], v.shape[3]))
    x = {"P_in_shared": False} | table | {name: value for name, value in given.items() if value is not None}
    if x["overlap_stages"] == 3 and given["BLOCK_N"] is None:
        x["BLOCK_N"] = 64  # two tiles of scores in registers
    consumers, overlap, specialized = x["BLOCK_M"] // 64, x["intra_wg_overlap"], x["warp_specialized"]
    x.setdefault("pingpong", (consumers >= 2 and max(d, d_v) <= 128) if overlap else (consumers == 2 and specialized))
    x.setdefault("persistent", specialized)
    wrong = []
    for name, allowed in (
        ("build", BUILDS),
        ("BLOCK_M", (64, 128, 192)),
        ("BLOCK_N", (16, 32, 64, 128, 256)),
        ("num_stages", range(1, 9)),
        ("overlap_stages", (2, 3)),
    ):
        if x[name] not in allowed:
            wrong.append(f"{name}: got {x[name]!r}, allowed are {', '.join(map(str, allowed))}")
    if x["overlap_stages"] == 3 and (not specialized or not overlap or x["P_in_shared"] or x["num_stages"] < 2):
        wrong.append("overlap_stages: 3 needs warp_specialized, intra_wg_overlap, P in registers and num_stages from 2")
    if x["persistent"] and not specialized:
        wrong.append("persistent: needs warp_specialized: the producer is what prefetches the next tile")
    if x["pingpong"] and not overlap and not specialized:
        wrong.append("pingpong: without intra_wg_overlap it needs warp_specialized: else turn and refill deadlock")
    if wrong:
        raise ArgumentError([f"fa3: {line}" for line in wrong])
    tile = ", ".join(f"{name} {x[name]}" for name in ("BLOCK_M", "BLOCK_N", "num_stages"))
    at = f"at head dims {d} and {d_v}"
    scores = x["BLOCK_N"] // 2 * (2 if overlap and x["overlap_stages"] == 3 else 1)  # of a thread, with 64 rows
    registers = scores + d_v // 2 + (0 if x["P_in_shared"] else x["BLOCK_N"] // 4) + OTHER_REGISTERS
    if registers > REGISTERS[consumers][0]:
        wrong.append(f"{tile}: {registers} registers a thread {at}, a consumer has {REGISTERS[consumers][0]}")
    v_rows = max(x["num_stages"], -(-x["BLOCK_M"] // x["BLOCK_N"])) * x["BLOCK_N"]
    elements = x["BLOCK_M"] * d + x["num_stages"] * x["BLOCK_N"] * d + v_rows * d_v
    size = 2 * (elements + x["P_in_shared"] * x["BLOCK_M"] * x["BLOCK_N"]) + 1024
    if size > MAX_SHARED_BYTE:
        wrong.append(f"{tile}: {size} bytes of shared memory {at}, there are {MAX_SHARED_BYTE}")
    if wrong:
        raise ArgumentError([f"fa3: {line}" for line in wrong])
    return x


def descriptor(x: torch.Tensor, rows: int) -> TensorDescriptor:
    """Of boxes of `rows` rows of one head, with columns up to the next power of two: TMA reads 0 there."""
    x = x.permute(0, 2, 1, 3)
    block = [1, 1, rows, padded(x.shape[3])]
    layout = gl.NVMMASharedLayout.get_default_for(block, {"fp16": gl.float16, "bf16": gl.bfloat16}[DTYPES[x.dtype]])
    # The stride of a dimension of size 1 means nothing, but has to be one that TMA takes.
    strides = [16 if size == 1 else stride for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True)]
    return TensorDescriptor(x, list(x.shape), [*strides, 1], block, layout)


def multiprocessors(device: torch.device) -> int:
    """Where a persistent CTA goes; 132, an H100's, where there is no GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def launch(
    kernel: Any,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    causal: bool,
    scale: float | None,
    **switches: int | bool | str | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Checks, and launches `fa3.fa3_fwd`. Raises ArgumentError."""
    check_attention(
        "fa3", q, k, v, scale=scale,
        dtypes=(torch.float16, torch.bfloat16), least_capability=90, most_capability=90, aligned=True,
    )  # fmt: skip
    # What stands in for a GPU, such as flashsim.gpu.gluon_cpu, takes the place of `run`.
    if q.device.type == "cpu" and "run" not in vars(kernel):
        raise ArgumentError(["fa3: q, k, v: on cpu, must be on a CUDA GPU: Triton's interpreter does not run Gluon"])
    x = tile_and_switches(q, v, switches)
    (batch, seqlen_q, heads, d), (_, seqlen_k, heads_kv, d_v) = q.shape, v.shape
    if not (batch and seqlen_q and seqlen_k):
        lse = torch.full((batch, heads, seqlen_q), float("-inf"), dtype=torch.float32, device=q.device)
        return torch.zeros(batch, seqlen_q, heads, d_v, dtype=q.dtype, device=q.device), lse
    o = torch.empty(batch, seqlen_q, heads, d_v, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, heads, seqlen_q, dtype=torch.float32, device=q.device)
    scheduler = ("dynamic" if causal else "static") if x["persistent"] else "cta"
    counter = (torch.zeros if scheduler == "dynamic" else torch.empty)(1, dtype=torch.int32, device=q.device)
    ctas = triton.cdiv(seqlen_q, x["BLOCK_M"]) * heads * batch
    if x["persistent"]:
        ctas = min(ctas, multiprocessors(q.device))
    fit = max(1, L2_SECTION_BYTE // (seqlen_k * (d + d_v) * q.element_size()))
    registers, producer_registers = REGISTERS[x["BLOCK_M"] // 64]
    with torch.cuda.device_of(q):
        kernel[(ctas,)](
            descriptor(q, 64), descriptor(k, x["BLOCK_N"]), descriptor(v, x["BLOCK_N"]), descriptor(o, 64),
            lse, counter, (d**-0.5 if scale is None else scale) * LOG2E,
            seqlen_q, seqlen_k, heads, heads // heads_kv, batch * heads,
            section=(1 << (fit.bit_length() - 1)) * (heads // heads_kv),
            BLOCK_M=x["BLOCK_M"], STAGES=x["num_stages"], CAUSAL=causal,
            SCHEDULER=scheduler,
            RESCALE_EARLY=x["build"] == "2024-07" or d > 128, FIRST_IN_TURN=x["build"] == "2024-07",
            PINGPONG=x["pingpong"], OVERLAP_STAGES=x["overlap_stages"] if x["intra_wg_overlap"] else 1,
            P_IN_SHARED=x["P_in_shared"], WARP_SPECIALIZED=x["warp_specialized"],
            REGISTERS=registers, PRODUCER_REGISTERS=producer_registers, num_warps=4,
        )  # fmt: skip
    return o, lse

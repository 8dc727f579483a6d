"""What every kernel asks of its arguments, all of it before any launch.

Layout is (batch, seqlen, heads, head_dim) throughout. Messages name the argument, what it was, and what is allowed.
"""

from collections.abc import Mapping, Sequence

import torch
import triton

from flashsim_kernels.launch import launch_parameters

DTYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float8_e4m3fn: "fp8"}
"""torch's dtypes and what launch tables call them."""
HEAD_DIM_STEP, HEAD_DIM_LEAST, HEAD_DIM_MOST = 8, 16, 256
GRID_MOST = 65535
"""Programs along the second and third dimension of a grid, which are heads and batch entries."""
ARCHITECTURES = {7: "turing", 8: "ampere", 9: "hopper", 10: "blackwell"}
"""By the major number of the compute capability."""
WITH_99_KIB = (86, 89, 120)
"""Ada, and the parts of Ampere and Blackwell with as little shared memory, and so the same rows of launch tables."""
LIMITS = {
    "num_warps": (1, 16),
    "num_stages": (1, 8),
    "ROWS": (1, 64),
    "SCORES": (16, 16384),
    "warp_specialized": (0, 1),
    "intra_wg_overlap": (0, 1),
}
TILE_LIMITS = 16, 256
"""Least and most of a launch parameter; of those that have no entry, which are sides of tiles of products."""


class ArgumentError(ValueError):
    """Arguments that a kernel cannot take: one line for each, in `problems`."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))


def interpreted() -> bool:
    """Whether kernels are run by Triton's interpreter, on the CPU (TRITON_INTERPRET=1 before triton is imported)."""
    return bool(triton.knobs.runtime.interpret)


def capability(device: torch.device) -> int:
    """Such as 90 for sm_90; of the target that is compiled for, where tensors are on torch's meta device."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return 10 * major + minor
    if device.type == "meta":
        return int(triton.runtime.driver.active.get_current_target().arch)
    return 90  # the interpreter takes every launch parameter


def architecture(device: torch.device) -> str:
    """ "ampere", "ada", "hopper", "blackwell", or "turing", which no kernel here is for."""
    number = capability(device)
    return "ada" if number in WITH_99_KIB else ARCHITECTURES.get(number // 10, f"sm_{number}")


def padded(head_dim: int) -> int:
    """Columns of a tile: Triton has powers of two only, of at least 16 for a product."""
    return max(16, triton.next_power_of_2(head_dim))


def check_tensors(name: str, **tensors: object) -> None:
    """Raise ArgumentError unless all are tensors. An operator can be called with nothing else; it asks the rest."""
    wrong = [
        f"{name}: {arg}: must be a torch.Tensor, got {type(x).__name__}"
        for arg, x in tensors.items()
        if not isinstance(x, torch.Tensor)
    ]
    if wrong:
        raise ArgumentError(wrong)


def sides(name: str, causal: bool, window: tuple[int | None, int | None] | None) -> tuple[int | None, int | None]:
    """How many keys before and after its own a query sees; None: all there are. Raises ArgumentError."""
    left, right = (None, None) if window is None else _window(name, window)
    if causal:
        right = 0
    return left, right


def _window(name: str, window: object) -> tuple[int | None, int | None]:
    pair = tuple(window) if isinstance(window, tuple | list) else ()
    if len(pair) != 2 or any(n is not None and (not isinstance(n, int) or n < 0) for n in pair):
        raise ArgumentError(
            [f"{name}: window: got {window!r}, must be (left, right), each a whole number from 0 or None for no end"]
        )
    return pair


def launch_arguments(
    name: str, kernel: str, q: torch.Tensor, v: torch.Tensor, overrides: Mapping[str, int | None]
) -> dict[str, int]:
    """What the Triton table has for `kernel` on q's device, with those of `overrides` that are not None in its place.

    Raises ArgumentError for tiles or numbers of warps that Triton does not have, and where the table has no row.
    """
    head_dim = max(q.shape[3], v.shape[3])
    try:
        launch = launch_parameters("triton", kernel, architecture(q.device), DTYPES[q.dtype], head_dim)
    except LookupError as error:
        raise ArgumentError([f"{name}: {error.args[0]}"]) from None
    launch |= {parameter: value for parameter, value in overrides.items() if value is not None}
    wrong = []
    for parameter, value in launch.items():
        least, most = LIMITS.get(parameter, TILE_LIMITS)
        power = parameter != "num_stages"
        if not least <= value <= most or (power and value & (value - 1)):
            allowed = f"{'the powers of two ' if power else ''}from {least} to {most}"
            wrong.append(f"{name}: {parameter}: got {value}, allowed are {allowed}")
    if wrong:
        raise ArgumentError(wrong)
    return launch


def check_attention(
    name: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    dtypes: Sequence[torch.dtype] = (torch.float16, torch.bfloat16, torch.float32),
    least_capability: int = 80,
    most_capability: int | None = None,
    head_dims: Sequence[int] | None = None,
    aligned: bool = False,
    scale: float | None = None,
) -> None:
    """Raise ArgumentError unless kernel `name` can take q (B, Sq, Hq, D), k (B, Sk, Hkv, D) and v (B, Sk, Hkv, Dv).

    Hkv divides Hq. `head_dims`: those allowed; None: multiples of 8 from 16 to 256. `aligned`: rows must lie at
    multiples of 16 bytes, as TMA wants them. `least_capability`, `most_capability`: of the GPU, such as 90 for sm_90.
    """
    tensors = {"q": q, "k": k, "v": v}
    check_tensors(name, **tensors)
    wrong: list[str] = []
    wrong += _device(tensors, least_capability, most_capability)
    allowed = ", ".join(str(dtype) for dtype in dtypes)
    wrong += [f"{arg}: dtype {x.dtype}, allowed are {allowed}" for arg, x in tensors.items() if x.dtype not in dtypes]
    if len({x.dtype for x in tensors.values()}) > 1:
        wrong.append(f"q, k, v: dtypes {q.dtype}, {k.dtype}, {v.dtype}, must be the same")
    shapeless = [
        f"{arg}: shape {tuple(x.shape)}, must have 4 dimensions (batch, seqlen, heads, head_dim)"
        for arg, x in tensors.items()
        if x.ndim != 4
    ]
    wrong += shapeless or _shapes(q, k, v, head_dims) + _strides(tensors, aligned)
    if scale is not None and not (isinstance(scale, int | float) and 0 <= scale < float("inf")):
        # The maximum of a row is taken before it is scaled.
        wrong.append(f"scale: got {scale!r}, must be a finite number from 0")
    if wrong:
        raise ArgumentError([f"{name}: {line}" for line in wrong])


def _device(tensors: dict[str, torch.Tensor], least: int, most: int | None) -> list[str]:
    devices = {arg: x.device for arg, x in tensors.items()}
    if len(set(devices.values())) > 1:
        return [f"q, k, v: on {', '.join(str(d) for d in devices.values())}, must be on the same device"]
    device = devices["q"]
    if interpreted():
        return [] if device.type == "cpu" else [f"q, k, v: on {device}, the interpreter takes tensors on the CPU only"]
    if device.type not in ("cuda", "meta"):
        return [
            f"q, k, v: on {device}, must be on a CUDA GPU "
            "(on the CPU the interpreter runs them: set TRITON_INTERPRET=1 before triton is imported)"
        ]
    number = capability(device)
    if number < least or (most is not None and number > most):
        allowed = (
            f"sm_{least} or later" if most is None else f"sm_{least}" if least == most else f"sm_{least} to sm_{most}"
        )
        return [f"q, k, v: on a GPU of compute capability sm_{number}, this kernel needs {allowed}"]
    return []


def _shapes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, head_dims: Sequence[int] | None) -> list[str]:
    wrong = []
    if len({x.shape[0] for x in (q, k, v)}) > 1:
        wrong.append(f"q, k, v: batch {q.shape[0]}, {k.shape[0]}, {v.shape[0]}, must be the same")
    if k.shape[1:3] != v.shape[1:3]:
        wrong.append(f"k, v: (seqlen, heads) {tuple(k.shape[1:3])} and {tuple(v.shape[1:3])}, must be the same")
    if k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        wrong.append(f"q, k: heads {q.shape[2]} and {k.shape[2]}, those of k must divide those of q")
    for what, size in (("batch", q.shape[0]), ("heads", q.shape[2])):
        if size > GRID_MOST:
            wrong.append(f"q: {what} {size}, allowed are up to {GRID_MOST}")
    if q.shape[3] != k.shape[3]:
        wrong.append(f"q, k: head dim {q.shape[3]} and {k.shape[3]}, must be the same")
    for arg, x in (("q", q), ("v", v)):
        d = x.shape[3]
        if head_dims is not None:
            if d not in head_dims:
                wrong.append(f"{arg}: head dim {d}, allowed are {', '.join(map(str, head_dims))}")
        elif d % HEAD_DIM_STEP or not HEAD_DIM_LEAST <= d <= HEAD_DIM_MOST:
            wrong.append(
                f"{arg}: head dim {d}, allowed are the multiples of {HEAD_DIM_STEP} "
                f"from {HEAD_DIM_LEAST} to {HEAD_DIM_MOST}"
            )
    return wrong


def _strides(tensors: dict[str, torch.Tensor], aligned: bool) -> list[str]:
    wrong = []
    for arg, x in tensors.items():
        if x.stride(3) != 1 and x.shape[3] > 1:
            wrong.append(f"{arg}: strides {x.stride()}, the last must be 1 (head_dim contiguous); use .contiguous()")
        elif aligned:
            unit = 16 // x.element_size()
            where = 0 if x.device.type == "meta" else x.data_ptr() % 16
            if where or any(stride % unit for stride, size in zip(x.stride()[:3], x.shape, strict=False) if size > 1):
                wrong.append(
                    f"{arg}: strides {x.stride()}, first element {where} bytes beyond a multiple of 16: "
                    f"TMA needs all rows at multiples of 16 bytes; use .contiguous()"
                )
    return wrong

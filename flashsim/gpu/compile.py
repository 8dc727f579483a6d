"""Compiles without a GPU exactly what a function would launch on one.

The function is called as a user calls it, with tensors on torch's meta device, in a process of its own where a driver
stands in for the GPU and a launch is a compilation that is recorded. So grids, launch parameters, specializations and
descriptors are those of the kernel's own code. Works for Triton and Gluon, 3.6 to 3.9; neither a GPU nor a CUDA
toolkit is needed: assembler and disassembler come with Triton.
"""

from __future__ import annotations

import base64
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

from flashsim.gpu.sass import Code, parse

TIMEOUT = 300
"""Seconds for one call; a kernel takes 1 to 3."""
_MARK = "flashsim-compiled:"
_ROOT = Path(__file__).parents[2]
_SPEC = "__tensor__"
_PARTITION = re.compile(r"^ *(?:default \{|partition\d+\(.*num_warps\((\d+)\))", re.MULTILINE)
_FEATURES = {
    "mma": re.compile(r"\b(?:tt\.dot|warp_group_dot|tc_gen5_mma\w*)\b(?!_wait)"),
    "exp": re.compile(r"\bmath\.exp2\b"),
    "tma": re.compile(r"\basync_tma_copy_global_to_local\b|\basync_tma_gather\b"),
}
_EXP_SHAPE = re.compile(r"\bmath\.exp2\b.*?: tensor<(\d+(?:x\d+)*)xf")


@dataclass(frozen=True)
class Tensor:
    """A tensor argument: no data, contiguous."""

    shape: tuple[int, ...]
    dtype: str = "float16"
    """As torch calls it."""


@dataclass(frozen=True)
class Call:
    """A call of a function that launches kernels.

    `function`: "package.module:name" or "path/to/file.py:name". Arguments are tensors and what JSON has.
    """

    function: str
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Role:
    """Warps of a CTA that run the same code: all of them, or a partition of a warp-specialized kernel."""

    warps: int
    features: frozenset[str]
    """What its part of the kernel has, of "mma", "exp" and "tma"."""
    exps: int = 0
    """Elements of the exponentials that stand in its part of the kernel."""


@dataclass(frozen=True)
class Compiled:
    """A kernel that was launched, as machine code."""

    kernel: str
    target: int
    """90 for sm_90."""
    grid: tuple[int, ...]
    constants: Mapping[str, Any]
    """Compile-time arguments by name, BLOCK_M among them."""
    types: Mapping[str, str]
    """Triton's names for the types of the arguments, such as *fp16 and tensordesc<fp16[128, 64]>."""
    num_warps: int
    """Of a CTA, as was asked for."""
    total_warps: int
    """... and as there are: more, if the kernel is warp specialized."""
    num_stages: int
    shared: int
    """Bytes of shared memory of a CTA."""
    tmem: int
    """Columns of tensor memory."""
    registers: int
    stack: int
    """Bytes a thread: spills and arrays in local memory."""
    ptx: str
    ttgir: str
    sass: str
    """As nvdisasm prints it, with labels."""
    cubin: bytes
    version: str
    """Of Triton."""

    @cached_property
    def code(self) -> Code:
        return parse(self.sass)

    @cached_property
    def roles(self) -> tuple[Role, ...]:
        """Who runs what, as TTGIR has it."""
        marks = list(_PARTITION.finditer(self.ttgir))
        bounds = [(mark.start(), int(mark[1] or self.num_warps)) for mark in marks]
        if not bounds:
            bounds = [(0, self.num_warps)]
        ends = [start for start, _ in bounds[1:]] + [len(self.ttgir)]
        texts = [self.ttgir[start:end] for (start, _), end in zip(bounds, ends, strict=True)]
        return tuple(
            Role(
                warps,
                frozenset(name for name, sign in _FEATURES.items() if sign.search(text)),
                sum(prod(map(int, shape.split("x"))) for shape in _EXP_SHAPE.findall(text)),
            )
            for (_, warps), text in zip(bounds, texts, strict=True)
        )


@dataclass(frozen=True)
class Failure:
    """Why there is no machine code."""

    kind: str
    """Name of the exception, or how the process ended."""
    message: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.message}"


def compile_call(call: Call, target: int) -> tuple[Compiled, ...] | Failure:
    """The kernels that `call` launches on a GPU of compute capability `target` (80, 90, 100), in order.

    A failure is an answer, with what the compiler said; nothing is raised. A function that launches nothing gives ().
    """
    request = {
        "function": call.function,
        "arguments": {name: _spec(value) for name, value in call.arguments.items()},
        "target": target,
        "packages": _folders("flashsim_kernels"),
    }
    with tempfile.TemporaryDirectory(prefix="flashsim-") as folder:
        # The interpreter would replace the compiler, and a cache of kernels would keep those of an older source.
        environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH", "")]))
        environment |= {"TRITON_CACHE_DIR": folder, "PYTHONPATH": path}
        command = [sys.executable, "-W", "ignore", "-c", "from flashsim.gpu.compile import _main; _main()"]
        try:
            done = subprocess.run(
                command, input=json.dumps(request), capture_output=True, text=True, env=environment, timeout=TIMEOUT
            )
        except subprocess.TimeoutExpired:
            return Failure("Timeout", f"not compiled within {TIMEOUT} s")
    answer = next((line for line in reversed(done.stdout.splitlines()) if line.startswith(_MARK)), None)
    if answer is None:
        return Failure(f"exit code {done.returncode}", _said(done.stderr) or "the compiler said nothing")
    content = json.loads(answer.removeprefix(_MARK))
    if "failure" in content:
        message, said = content["message"], _said(done.stderr)
        return Failure(content["failure"], f"{message}\n{said}" if said else message)
    return tuple(
        Compiled(**{**one, "grid": tuple(one["grid"]), "cubin": base64.b64decode(one["cubin"])})
        for one in content["kernels"]
    )


def _said(stderr: str, lines: int = 12) -> str:
    """The end of what the compiler wrote, without what nanobind says of itself at exit."""
    kept = [line for line in stderr.splitlines() if "nanobind" not in line and not line.startswith(" - ")]
    return "\n".join(line[:300] for line in kept[-lines:])


def _spec(value: Any) -> Any:
    return {_SPEC: asdict(value)} if isinstance(value, Tensor) else value


def _folders(*packages: str) -> dict[str, str]:
    """Where the packages of this process lie: the other process takes the same ones."""
    found = {}
    for package in packages:
        spec = sys.modules[package].__spec__ if package in sys.modules else importlib.util.find_spec(package)
        if spec is not None and spec.origin is not None:
            found[package] = str(Path(spec.origin).parent)
    return found


# What follows runs in the process that compiles.


def _main() -> None:
    request = json.load(sys.stdin)
    try:
        answer: dict[str, Any] = {"kernels": [asdict(one) for one in _compile(request)]}
        for one in answer["kernels"]:
            one["cubin"] = base64.b64encode(one["cubin"]).decode()
    except BaseException as error:  # SystemExit of a user's file, too, is an answer
        answer = {"failure": type(error).__name__, "message": str(error)[:2000]}
    sys.stdout.write(f"\n{_MARK}{json.dumps(answer, default=str)}\n")


def _compile(request: Mapping[str, Any]) -> list[Compiled]:
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    target = GPUTarget("cuda", request["target"], 32)
    triton.runtime.driver.set_active(_Driver(target))
    _plain_operators()
    found: list[Compiled] = []
    compile_and_launch = JITFunction.run

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        options.setdefault("enable_fp_fusion", True)  # as it is in 3.6 to 3.9, where nobody says otherwise
        kernel = compile_and_launch(self, *args, grid=grid, warmup=True, **options)
        names = [parameter.name for parameter in self.params]
        bound = {**dict(zip(names, args, strict=False)), **options}
        size = tuple(grid(bound) if callable(grid) else grid)
        constants = {names[index]: _plain(value) for (index, *_), value in kernel.src.constants.items()}
        types = {name: str(kind) for name, kind in kernel.src.signature.items() if kind != "constexpr"}
        found.append(_compiled(self.fn.__name__, kernel, request["target"], size, constants, types))
        return kernel

    JITFunction.run = record
    for package, folder in request["packages"].items():
        _import_from(package, Path(folder) / "__init__.py", search=folder)
    arguments = {
        name: torch.empty(value[_SPEC]["shape"], dtype=getattr(torch, value[_SPEC]["dtype"]), device="meta")
        if isinstance(value, dict) and _SPEC in value
        else value
        for name, value in request["arguments"].items()
    }
    _function(request["function"])(**arguments)
    return found


class _Driver:
    """What Triton asks of a GPU before it compiles."""

    def __init__(self, target: Any) -> None:
        self.target = target

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: Any = None) -> int:
        return 0


def _plain_operators() -> None:
    """Let a custom operator of the kernels be its function: for meta tensors torch would call its fake instead."""
    import torch

    custom_op = torch.library.custom_op

    class Operator:
        def __init__(self, function: Callable[..., Any]) -> None:
            self.function = function

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return self.function(*args, **kwargs)

        def __getattr__(self, name: str) -> Callable[..., Any]:
            if not name.startswith("register_"):
                raise AttributeError(name)
            return lambda function=None, *_, **__: function if callable(function) else lambda one: one

    def plain(name: str, function: Any = None, /, **options: Any) -> Any:
        if not name.startswith("flashsim_kernels::"):
            return custom_op(name, function, **options)
        return Operator if function is None else Operator(function)

    torch.library.custom_op = plain


def _function(name: str) -> Callable[..., Any]:
    where, _, attribute = name.rpartition(":")
    module = _import_from(Path(where).stem, Path(where)) if where.endswith(".py") else importlib.import_module(where)
    found = getattr(module, attribute)
    assert callable(found)
    return found  # type: ignore[no-any-return]


def _import_from(name: str, path: Path, search: str | None = None) -> Any:
    spec = importlib.util.spec_from_file_location(name, path, submodule_search_locations=[search] if search else None)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _plain(value: Any) -> Any:
    return value if isinstance(value, int | float | str | bool | None) else str(value)


def _compiled(
    name: str, kernel: Any, target: int, grid: Sequence[int], constants: Mapping[str, Any], types: Mapping[str, str]
) -> Compiled:
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    ttgir, metadata = kernel.asm["ttgir"], kernel.metadata
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()

        def run(*command: str) -> str:
            return subprocess.run(
                [str(tools / command[0]), *command[1:], file.name], capture_output=True, text=True, check=True
            ).stdout

        usage = run("cuobjdump", "-res-usage")
        sass = run("nvdisasm", "-c")
    resources = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    asked = re.search(r'"ttg\.num-warps" = (\d+)', ttgir)
    assert resources, usage
    return Compiled(
        kernel=name,
        target=target,
        grid=tuple(map(int, grid)),
        constants=dict(constants),
        types=dict(types),
        num_warps=int(asked[1]) if asked else metadata.num_warps,
        total_warps=metadata.num_warps,
        num_stages=metadata.num_stages,
        shared=metadata.shared,
        tmem=getattr(metadata, "tmem_size", None) or 0,
        registers=int(resources[1]),
        stack=int(resources[2]) + int(resources[3]),
        ptx=kernel.asm["ptx"],
        ttgir=ttgir,
        sass=sass,
        cubin=kernel.asm["cubin"],
        version=triton.__version__,
    )

"""Runs `flashsim_kernels.fa3` under Triton's profiler, Proton, with a scope around each phase.

The kernel knows nothing of this: its device functions are replaced by ones that enter a scope, call the function and
leave the scope. That must be done before the kernel is compiled for the first time, so it is done in a new process.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import json
import sys
import tempfile
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flashsim.errors import InputError

SCOPES = {
    "softmax": "online_softmax",
    "turn": "wait_turn",
    "rescale": "rescale",
    "convert": "convert",
    "output": "write_output",
    "wait for products": "warpgroup_mma_wait",
    "wait full": "Ring.wait_full",
    "wait empty": "Ring.wait_empty",
}
"""What a scope is called, and the device function that it is around."""
KERNEL = "flashsim_kernels.fa3"
"""That module, and those beside it whose names begin so."""
WARPS = (0, 4, 8, 12)
"""One of each consumer, and the producer's."""
HEAD = """\
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.profiler.language import enter_scope, exit_scope
"""
SCOPED = """

@gluon.jit
def scoped_{name}({parameters}):
    enter_scope({scope!r})
    {result}{name}({arguments})
    exit_scope({scope!r})
    {returns}
"""


def instrument() -> None:
    """Put the scopes around the device functions of `fa3`. Raises InputError where one of them is not there."""
    importlib.import_module(KERNEL)
    modules = [module for name, module in list(sys.modules.items()) if name.startswith(KERNEL)]
    places = {scope: _places(name, modules) for scope, name in SCOPES.items()}
    missing = [f"timeline: {KERNEL} has no {SCOPES[scope]}" for scope, found in places.items() if not found]
    if missing:
        raise InputError(missing)
    functions = {scope: getattr(*found[0]) for scope, found in places.items()}
    scoped = _module(functions)
    for found in places.values():
        for owner, name in found:
            setattr(owner, name, getattr(scoped, f"scoped_{name}"))


def _places(name: str, modules: list[Any]) -> list[tuple[Any, str]]:
    """Whose attribute the function is, and what it is called there."""
    owner, _, attribute = name.rpartition(".")
    owners = list({id(o): o for m in modules if (o := getattr(m, owner, None))}.values()) if owner else modules
    return [(one, attribute) for one in owners if hasattr(one, attribute)]


def _module(functions: Mapping[str, Any]) -> Any:
    """A module with a scoped version of each function; Triton reads the text of what it compiles from a file."""
    text = HEAD + "".join(_scoped(scope, function) for scope, function in functions.items())
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "scoped.py"
        file.write_text(text, encoding="utf-8")
        spec = importlib.util.spec_from_file_location("flashsim_scoped", file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        vars(module).update({_name_of(function): function for function in functions.values()})
        spec.loader.exec_module(module)
    return module


def _name_of(function: Any) -> str:
    return str(getattr(function, "fn", function).__name__)


def _scoped(scope: str, function: Any) -> str:
    name, text = _name_of(function), getattr(function, "fn", None)
    if text is None:  # of the language, whose signature says more than a device function can
        parameters, arguments, returns = "count: gl.constexpr, deps", "count, deps=deps", True
    else:
        definition = ast.parse(textwrap.dedent(inspect.getsource(text))).body[0]
        assert isinstance(definition, ast.FunctionDef)
        parameters = ast.unparse(definition.args)
        arguments = ", ".join(argument.arg for argument in definition.args.args)
        returns = any(isinstance(node, ast.Return) and node.value for node in ast.walk(definition))
    return (
        SCOPED.format(
            name=name,
            scope=scope,
            parameters=parameters,
            arguments=arguments,
            result="result = " if returns else "",
            returns="return result" if returns else "",
        ).rstrip(" \n")
        + "\n"
    )


def work(request: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Runs one problem on the GPU; in a process of its own.

    `request`: problem (its fields), path. Writes what Proton recorded to `path`, as Chrome trace events, and yields
    {consumers}. Raises InputError where Proton does not work.
    """
    import torch
    import triton.profiler as proton
    from triton.profiler import mode

    from flashsim.problem import AttentionProblem
    from flashsim.schedules.launch import launch_parameters

    instrument()
    from flashsim_kernels.fa3 import fa3

    problem = AttentionProblem(**request["problem"])
    consumers = launch_parameters("gluon", "fa3_fwd", problem, "hopper")["BLOCK_M"] // 64
    torch.manual_seed(0)
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[problem.dtype]
    q, k, v = (
        torch.randn(problem.batch, n, heads, width, dtype=dtype, device="cuda")
        for n, heads, width in (
            (problem.seqlen_q, problem.heads_q, problem.head_dim),
            (problem.seqlen_k, problem.heads_kv, problem.head_dim),
            (problem.seqlen_k, problem.heads_kv, problem.head_dim_v),
        )
    )
    with tempfile.TemporaryDirectory() as folder:
        warps = ",".join(str(warp) for warp in WARPS[: consumers + 1])
        how = mode.Default(optimizations="clock32,time_shift", sampling_strategy="selective", sampling_options=warps)
        proton.start(str(Path(folder) / "fa3"), data="trace", backend="instrumentation", mode=how)
        try:
            fa3(q, k, v, causal=problem.mask == "causal")
            torch.cuda.synchronize()
        finally:
            proton.finalize()
        files = sorted(Path(folder).glob("*.chrome_trace"))
        if not files:
            raise InputError("timeline: Proton wrote no trace")
        Path(request["path"]).write_text(json.dumps(json.loads(files[0].read_text())), encoding="utf-8")
    yield {"consumers": consumers}

"""Write docs/kill-table.md: which acceptance rule rejects which bug.

    python docs/kill_table.py

Takes about a minute. The bugs and the correct kernel are in tests/properties.
"""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "properties")]

import twin  # noqa: E402
from catalogue import CATALOGUE  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from rules import RULES, verdicts  # noqa: E402
from twin_cases import LISTED, PARTS, Case, Prepared, cases  # noqa: E402

DRAWN = 1000
"""Drawn problems, besides the listed ones, on which the correct kernel is tried."""

HEAD = """# Which rule rejects which bug

{bugs} bugs of attention kernels, each a change of one to three lines of a correct tile loop in numpy
([`tests/properties/twin.py`](../tests/properties/twin.py), bugs in [`bugs/`](../tests/properties/bugs)), held against
flashsim's acceptance rule and against rules in use elsewhere, on {problems}.

A number is in how many problems the rule rejects the result. A problem in which it rejects the correct kernel as well
does not count, since there it tells nothing. **0**: the bug passes everywhere. *by*: the tensors that give it away to
flashsim's rule. Written by `python docs/kill_table.py`.

- **flashsim**: against float64; the largest error at most 2 times (gradients 3) that of unfused attention in the same
  dtype and the mean at most 1.5 times, each plus a bound derived in `flashsim/numerics`; zeros only where they belong;
  the LSE. For fp8 the unfused computation rounds P to e4m3 too.
{rules}

The others look at O or at the gradients only, as most suites do; flash-attn's has further tests for the LSE.

"""


def row(*cells: object) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |\n"


def alarms() -> str:
    """How often each rule rejects the correct kernel."""
    problems: list[Case] = []

    @settings(max_examples=DRAWN, derandomize=True, database=None, deadline=None)
    @given(cases())
    def draw(case: Case) -> None:
        if case.dtype != "fp32":  # the others' rules are for 16 bits
            problems.append(case)

    draw()
    text = ""
    for part in PARTS:
        prepared = [Prepared(case) for case in (*LISTED, *problems) if case.part == part]
        rejected = Counter(
            name for case in prepared for name, accepted in verdicts(case, case.run(twin)).items() if not accepted
        )
        counts = [rejected[name] for name in ("flashsim", *RULES)]
        text += row(f"correct kernel, {part}", f"false alarms in {len(prepared)} problems", "", *counts)
    return text


def kills() -> str:
    """How often each rule tells each bug from the correct kernel."""
    listed = [Prepared(case) for case in LISTED]
    useful = {case.case: verdicts(case, case.run(twin)) for case in listed}
    text, found = "", Counter[str]()
    for bug in CATALOGUE:
        module, rejected, tensors = bug.module(), Counter[str](), set[str]()
        for case in listed:
            if case.case.part != bug.part:
                continue
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)
                outputs = case.run(module)
                verdict = verdicts(case, outputs)
                tensors |= {clause.what.partition(":")[0] for clause in case.judge(outputs).broken}
            rejected.update(name for name in verdict if useful[case.case][name] and not verdict[name])
        found.update(name for name in rejected)
        counts = [rejected[name] or "**0**" for name in ("flashsim", *RULES)]
        order = [name for name in ("O", "LSE", "dq", "dk", "dv") if name in tensors]
        text += row(bug.key, bug.described(), ", ".join(order), *counts)
    return row("**bugs rejected**", f"of {len(CATALOGUE)}", "", *(found[name] for name in ("flashsim", *RULES))) + text


def main() -> None:
    sizes = Counter(case.part for case in LISTED)
    problems = "{forward} forward, {backward} backward and {fp8} fp8 problems".format(**sizes)
    rules = "\n".join(f"- **{name}**: {about}." for name, (about, _) in RULES.items())
    table = row("bug", "what is wrong", "by", "flashsim", *RULES) + "|---|---|---|" + "--:|" * (1 + len(RULES)) + "\n"
    text = HEAD.format(bugs=len(CATALOGUE), problems=problems, rules=rules) + table + alarms() + kills()
    (ROOT / "docs" / "kill-table.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

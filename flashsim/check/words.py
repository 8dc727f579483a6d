"""What `flashsim check` prints."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flashsim.check.prove import Report
from flashsim.check.survey import KILLED, SURVIVED, Survey

if TYPE_CHECKING:
    from rich.table import Table

WITHOUT = "exact, and without race, hazard or deadlock"
SAY_WHY = "survived: say why with a comment on the line, # equivalent: REASON"


def report_lines(report: Report) -> list[str]:
    """The outcome of one check: a line, or the smallest example that fails and how."""
    failure = report.failure
    if failure is None:
        return [f"{report.schedule}: {report.examples} examples, seed {report.seed}: {WITHOUT}"]
    example = failure.example
    p, attention = example.problem, example.attention
    switches = " ".join(f"{name}={value}" for name, value in example.options.items())
    return [
        f"{report.schedule}: {failure.kind} in example {report.examples}",
        failure.message,
        "",
        f"smallest problem found: batch {p.batch}, heads {p.heads_q}/{p.heads_kv}, seqlen {p.seqlen_q}/{p.seqlen_k}, "
        f"head dim {p.head_dim}/{p.head_dim_v}, {p.mask}, {p.dtype}{', rounded to it' if example.rounded else ''}"
        f"{'' if p.direction == 'fwd' else f', {p.direction}'}{f', dropout {p.dropout:g}' if p.dropout else ''}",
        f"switches: {switches or 'none'}; {example.gpu} with {example.sms} of its SMs; "
        f"values: {attention.kind}, seed {attention.seed}; latencies: {example.latencies}",
        *(["", "cycles, who and what:", *(f"  {line}" for line in failure.timeline)] if failure.timeline else []),
        "",
        f"replay: {report.replay}",
    ]


def survey_table(survey: Survey) -> Table:
    """One row for each mutant."""
    from rich.table import Table

    table = Table(title=survey.schedule, title_justify="left", box=None, pad_edge=False)
    for name in ("file", "line", "function", "statement", "change", "outcome", "by, or why"):
        table.add_column(name, no_wrap=name != "by, or why", overflow="fold")
    for verdict in survey.verdicts:
        statement = " ".join(verdict.statement.split())
        row = (
            verdict.file,
            str(verdict.line),
            verdict.function,
            statement,
            verdict.change,
            verdict.outcome,
            verdict.how,
        )
        table.add_row(*row)
    return table


def survey_lines(survey: Survey) -> list[str]:
    """How many mutants there are, what became of them, and what to do about those that survived."""
    counts = {outcome: n for outcome, n in survey.counts.items() if n or outcome == KILLED}
    line = f"{survey.schedule}: {len(survey.verdicts)} mutants: " + ", ".join(f"{n} {o}" for o, n in counts.items())
    return [line, SAY_WHY] if survey.counts[SURVIVED] else [line]

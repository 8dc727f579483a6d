"""`flashsim gpus` and `schedules`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from flashsim.cli.app import OK, app
from flashsim.cli.show import Json, show, write_json

ABOUT = ("title", "source", "architectures", "masks", "dtypes", "directions", "dropout")
"""What a schedule says of itself, beside its switches."""


@app.command()
def gpus(
    name: Annotated[str | None, typer.Argument(metavar="[NAME|FILE]", help="Print every number of this one.")] = None,
    as_json: Json = False,
) -> int:
    """List the GPUs, or print every number of one with its source."""
    from flashsim.devices import device_names, load_device

    specs = [load_device(known) for known in (device_names() if name is None else [name])]
    about = [
        {key: getattr(spec, key) for key in ("name", "title", "architecture", "compute_capability", "device_hash")}
        for spec in specs
    ]
    if as_json and name is None:
        write_json({"gpus": about})
    elif as_json:
        numbers = {key: dict(vars(cited)) for key, cited in specs[0].citations.items()}
        write_json({**about[0], "numbers": numbers})
    else:
        from flashsim.analysis.tables import gpu_table, gpus_table

        if name is None:
            show(gpus_table(specs))
        else:
            show(f"{specs[0].name}: {specs[0].title}, {specs[0].architecture}", gpu_table(specs[0]))
    return OK


@app.command()
def schedules(
    name: Annotated[str | None, typer.Argument(metavar="[NAME|FILE]", help="Print the switches of this one.")] = None,
    as_json: Json = False,
) -> int:
    """List the schedules, or print the switches of one."""
    from flashsim.schedules import load_schedule, schedule_names

    classes = [load_schedule(known) for known in (schedule_names() if name is None else [name])]
    about = [
        {"name": schedule.name()}
        | {key: getattr(schedule, key) for key in ABOUT}
        | {"switches": [_switch(switch) for switch in schedule.switches()]}
        for schedule in classes
    ]
    if as_json:
        write_json({"schedules": about} if name is None else about[0])
    else:
        from flashsim.analysis.tables import schedules_table, switches_table

        if name is None:
            show(schedules_table(classes))
        else:
            show(
                f"{about[0]['name']}: {about[0]['title']}", f"source: {about[0]['source']}", switches_table(classes[0])
            )
    return OK


def _switch(switch: Any) -> dict[str, Any]:
    keys = {"name": "name", "type": "type_name", "default": "default", "choices": "choices", "help": "help"}
    return {key: getattr(switch, attribute) for key, attribute in keys.items()}

"""`xdit`: one picture computed by several cards.

What is here is what planning needs: the parameters, and the rules that hold xDiT apart from the offloads. This version
does not start xDiT's processes; a rule in `schema/compatibility.yaml` says so before anything is loaded.
"""

from __future__ import annotations

from engine.errors import IncompatibleError
from engine.optimizers.spec import Context, Param, Pipeline, Spec, nothing_to_load
from engine.values import Step

SPEC = Spec(
    name="xdit",
    summary="one picture computed by several cards",
    slot=80,
    lasts="each card runs a process of its own",
    params=(
        Param(name="num_gpus", kind="count", default=1, about="cards in all"),
        Param(name="data_parallel_degree", kind="count", default=1, about="pictures computed side by side"),
        Param(name="ulysses_degree", kind="count", default=1, about="cards that share attention heads"),
        Param(name="ring_degree", kind="count", default=1, about="cards that share the sequence in a ring"),
        Param(name="pipefusion_degree", kind="count", default=1, about="cards that share the blocks"),
        Param(name="use_cfg_parallel", kind="bool", default=False, about="guided and unguided pass on two cards"),
    ),
)
load_arguments = nothing_to_load


def apply(pipe: Pipeline, step: Step, context: Context) -> None:
    raise IncompatibleError("xdit cannot be applied to a loaded pipeline", "each card runs a process of its own")


def verify(pipe: Pipeline, step: Step, context: Context) -> str:
    raise IncompatibleError("xdit cannot be verified on a loaded pipeline", "each card runs a process of its own")

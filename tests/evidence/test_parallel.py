"""Several cards: what can be shown of them on processes that compute on the CPU."""

from __future__ import annotations

import socket
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engine import compat, optimizers, versions
from tests.evidence import small

ORDERS = (True, False)
HOOKED = ("leaf", "leaf, streamed", "block, streamed", "sequential", "model")


def _other(index: int, port: int) -> None:
    """The other process."""
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    _split(1, port)


def _split(rank: int, port: int) -> dict[Any, Any]:
    """One of two processes: a FLUX transformer whose sequence is split between them, beside hooks of each kind."""
    import accelerate
    import torch.distributed as dist
    import torch.distributed._functional_collectives as collectives
    from accelerate.hooks import remove_hook_from_module
    from diffusers import ContextParallelConfig
    from torch.distributed.device_mesh import init_device_mesh

    from truth import device

    device.load()
    where = torch.device(device.NAME)
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2, timeout=timedelta(seconds=120)
    )
    plain_ones = {name: getattr(collectives, name) for name in ("all_to_all_single", "all_gather_tensor")}
    for name, plain_one in plain_ones.items():
        setattr(collectives, name, _on_the_host(plain_one))
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("ring", "ulysses"))

    def split(module: Any) -> None:
        module.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2, mesh=mesh))

    def place(module: Any, how: str) -> None:
        if how == "model":
            accelerate.cpu_offload_with_hook(module, where)
        elif how == "sequential":
            accelerate.cpu_offload(module, where)
        else:
            small.group(module, "block_level" if "block" in how else "leaf_level", stream="streamed" in how)

    plain = small.forward(small.transformer(blocks=1))
    found: dict[Any, Any] = {}
    for how in HOOKED:
        for is_first in ORDERS:
            module = small.transformer(blocks=1)
            if is_first:
                split(module)
            place(module, how)
            if not is_first:
                split(module)
            found[how, is_first] = all(small.alike(small.forward(module, where), plain) for _ in range(2))
            if how == "model":  # as a pipeline does at the end of a call
                remove_hook_from_module(module, recurse=True)
                place(module, how)
                found["model again", is_first] = small.alike(small.forward(module, where), plain)
    module = small.transformer(blocks=1)
    split(module)
    given = small.inputs(batch=2)
    found["two"] = small.alike(module(**given)[0], small.transformer(blocks=1)(**given)[0])
    found["twice"] = _raised(lambda: split(module))
    found["odd"] = _raised(lambda: module(**small.inputs(tokens=15)))
    module = small.transformer(blocks=1, heads=3)
    split(module)
    found["three heads"] = _raised(lambda: small.forward(module))
    dist.barrier()
    dist.destroy_process_group()
    for name, plain_one in plain_ones.items():
        setattr(collectives, name, plain_one)
    return found


def _on_the_host(plain: Any) -> Any:
    """Processes speak of host memory only."""

    def called(given: Any, *args: Any, **more: Any) -> Any:
        if given.device.type == "cpu":
            return plain(given, *args, **more)
        made = plain(given.cpu(), *args, **more)
        return (made.wait() if hasattr(made, "wait") else made).to(given.device)

    return called


def _raised(act: Any) -> str:
    try:
        act()
    except (AssertionError, RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.slow
@pytest.mark.rule(
    "context-parallel-before-model-offload",
    "context-parallel-twice",
    "context-parallel-goes-with-offloads",
    "context-parallel-divides-evenly",
)
def test_context_parallelism(counted: torch.device) -> None:
    mp: Any = torch.multiprocessing
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    running = mp.spawn(_other, args=(port,), nprocs=1, join=False)
    told = _split(0, port)
    while not running.join():
        pass
    assert all(told[how, is_first] for how in HOOKED for is_first in ORDERS), told
    assert (told["model again", True], told["model again", False]) == (True, False)
    assert told["two"]
    assert "cannot be called twice" in told["twice"]
    assert "divisible" in told["odd"]
    assert told["three heads"]


@pytest.mark.rule("context-parallel-needs-a-plan")
def test_the_denoisers_whose_sequence_can_be_split() -> None:
    with_plan = {n for n, c in small.models().items() if getattr(c, "_cp_plan", None)}
    assert with_plan == small.listed("context-parallel-needs-a-plan", "other_than")


@pytest.mark.rule("context-parallel-needs-several-cards")
def test_a_sequence_is_split_among_processes() -> None:
    from diffusers import ContextParallelConfig

    with pytest.raises(RuntimeError, match="must be available and initialized"):
        small.transformer().enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))


@pytest.mark.rule(
    "tensor-parallel-or-model-offload", "tensor-parallel-or-sequential-offload", "tensor-parallel-or-group-offload"
)
def test_offloads_refuse_split_weights() -> None:
    """Weights are split on cards only; what diffusers asks of a module before it offloads it is asked here."""
    from truth import pipelines

    pipe, _ = pipelines.made("pixart")
    pipe.transformer._parallel_config = SimpleNamespace(tensor_parallel_config=object())
    for act in (pipe.enable_model_cpu_offload, pipe.enable_sequential_cpu_offload):
        with pytest.raises(ValueError, match="sharded with tensor parallelism"):
            act(device="cpu")
    with pytest.raises(ValueError, match="sharded with tensor parallelism"):
        pipe.transformer.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")


@pytest.mark.rule("xdit-needs-several-cards", "xdit-needs-linux")
def test_xdit_wants_several_cards_and_linux() -> None:
    """By the rules, and by how this project's own optional dependency is declared: xfuser does not run here."""
    listed = [optimizers.spec("xdit").step()]

    def told(**known: Any) -> set[str]:
        found = compat.under(compat.Facts(**known)).findings(listed)
        return {f.rule.id for f in found} - {"xdit-is-not-started"}

    assert told(gpus=1, platform="win32") == {"xdit-needs-several-cards", "xdit-needs-linux"}
    assert told(gpus=2, platform="linux") == told() == set()
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    assert "xfuser>=0.7; sys_platform == 'linux'" in text


@pytest.mark.rule("xdit-does-not-import-without-an-accelerator")
def test_xfuser_does_not_import_here() -> None:
    if versions.installed("xfuser") is None:
        pytest.skip("xfuser is not installed")
    if torch.cuda.is_available():
        pytest.skip("there is an accelerator here")
    with pytest.raises((ImportError, RuntimeError, NotImplementedError), match=r"triton|No Accelerators"):
        import xfuser  # noqa: F401

"""The layers: a module imports only from earlier ones, and torch lives behind one edge."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "engine"

# In reading order. A package's own name stands for its __init__.
LAYERS = [
    "engine",
    "engine.version",
    "engine.units",
    "engine.errors",
    "engine.words",
    "engine.paths",
    "engine.files",
    "engine.collector",
    "engine.values",
    "engine.gpus",
    "engine.documents",
    "engine.plain",
    "engine.validation",
    "engine.prompts",
    "engine.versions",
    "engine.calibration",
    "engine.facts.attention",
    "engine.facts.convolutions",
    "engine.facts.widening",
    "engine.facts.tiling",
    "engine.facts.casting",
    "engine.facts.from_picture",
    "engine.facts.video",
    "engine.facts.model",
    "engine.facts.classes",
    "engine.facts.bounds",
    "engine.facts.weights",
    "engine.facts.directory",
    "engine.facts.embedded",
    "engine.facts.catalogue",
    "engine.facts.hub",
    "engine.facts",
    "engine.facts.integrity",
    "engine.facts.loras",
    "engine.probe.host",
    "engine.probe.faults",
    "engine.probe.nvml",
    "engine.probe.visibility",
    "engine.probe",
    "engine.optimizers.spec",
    "engine.optimizers.hooks",
    "engine.optimizers.offload",
    "engine.optimizers.tiles",
    "engine.optimizers.allocator",
    "engine.optimizers.tf32",
    "engine.optimizers.staged_encoding",
    "engine.optimizers.dtype",
    "engine.optimizers.fuse_qkv",
    "engine.optimizers.attention_slicing",
    "engine.optimizers.attention_backend",
    "engine.optimizers.channels_last",
    "engine.optimizers.layerwise_casting",
    "engine.optimizers.cache",
    "engine.optimizers.vae_slicing",
    "engine.optimizers.vae_tiling",
    "engine.optimizers.xdit",
    "engine.optimizers.compile",
    "engine.optimizers.resident",
    "engine.optimizers.model_offload",
    "engine.optimizers.sequential_offload",
    "engine.optimizers.group_offload",
    "engine.optimizers",
    "engine.optimizers.placing",
    "engine.history",
    "engine.compat.when",
    "engine.compat.rules",
    "engine.compat.findings",
    "engine.compat",
    "engine.profiles.places",
    "engine.profiles.wording",
    "engine.profiles.raw",
    "engine.profiles.rules",
    "engine.profiles.inherit",
    "engine.profiles.search",
    "engine.profiles.changes",
    "engine.profiles",
    "engine.estimate",
    "engine.estimate.trace",
    "engine.estimate.allocator",
    "engine.estimate.pinned",
    "engine.estimate.tracefile",
    "engine.estimate.placements",
    "engine.estimate.stream",
    "engine.estimate.workspaces",
    "engine.estimate.clock",
    "engine.estimate.bounds",
    "engine.estimate.ways",
    "engine.estimate.assumed",
    "engine.estimate.whole",
    "engine.estimate.dryrunner",
    "engine.estimate.timeline",
    "engine.estimate.between",
    "engine.estimate.store",
    "engine.estimate.estimator",
    "engine.pictures",
    "engine.arguments",
    "engine.cards",
    "engine.solve.situation",
    "engine.solve.prices",
    "engine.solve.opened",
    "engine.solve.candidates",
    "engine.solve.judge",
    "engine.solve.reasons",
    "engine.solve.exact",
    "engine.solve.search",
    "engine.solve",
    "engine.plan",
    "engine.lock",
    "engine.lockfile",
    "engine.explain",
    "engine.svg",
    "engine.chart",
    "engine.api",
    "engine.advice",
    "engine.rungs",
    "engine.drift",
    "engine.check",
    "engine.scenarios",
    "engine.review",
    "engine.doctor",
    "engine.dryrun",
    "engine.dryrun.tokens",
    "engine.dryrun.pictures",
    "engine.dryrun.tensors",
    "engine.dryrun.shapes",
    "engine.dryrun.twins",
    "engine.dryrun.kernels",
    "engine.dryrun.works",
    "engine.dryrun.follow",
    "engine.dryrun.operators",
    "engine.dryrun.stand_ins",
    "engine.dryrun.build",
    "engine.dryrun.inputs",
    "engine.dryrun.phases",
    "engine.dryrun.record",
    "engine.dryrun.components",
    "engine.dryrun.run",
    "engine.dryrun.worker",
    "engine.run",
    "engine.run.progress",
    "engine.run.download",
    "engine.run.interrupt",
    "engine.run.accelerator",
    "engine.run.tables",
    "engine.run.device",
    "engine.run.lock",
    "engine.run.parts",
    "engine.run.items",
    "engine.run.calls",
    "engine.run.stages",
    "engine.run.applied",
    "engine.run.callers",
    "engine.run.fuse",
    "engine.run.lacking",
    "engine.run.load",
    "engine.run.staged",
    "engine.run.remember",
    "engine.run.world",
    "engine.run.fallback",
    "engine.run.media",
    "engine.run.overflow",
    "engine.run.preview",
    "engine.run.reading",
    "engine.run.runner",
    "engine.run.generate",
    "engine.run.output",
    "engine.run.places",
    "engine.run.journal",
    "engine.run.like",
    "engine.run.measure",
    "engine.cli.options",
    "engine.cli.calibrate",
    "engine.cli.doctor",
    "engine.cli.generate",
    "engine.cli.show",
    "engine.cli.requests",
    "engine.cli.drawing",
    "engine.cli.locks",
    "engine.cli.plan",
    "engine.cli.profiles.showing",
    "engine.cli.profiles.linting",
    "engine.cli.profiles.differing",
    "engine.cli.profiles.trying",
    "engine.cli.profiles.making",
    "engine.cli.profiles",
    "engine.cli",
    "engine.__main__",
]

# The few calls upward, each lazy and each on purpose.
UPWARD = {
    ("engine", "engine.api"): "the root's names are imported when they are asked for",
    ("engine", "engine.advice"): "the same",
    ("engine", "engine.rungs"): "the same",
    ("engine", "engine.errors"): "the same",
    ("engine", "engine.plan"): "the same",
    ("engine", "engine.lock"): "the same",
    ("engine", "engine.lockfile"): "the same",
    ("engine", "engine.drift"): "the same",
    ("engine", "engine.check"): "the same",
    ("engine", "engine.version"): "the same",
    ("engine.plan", "engine.explain"): "Plan.explain",
    ("engine.plan", "engine.lock"): "the type of what Plan.lock returns",
    ("engine.plan", "engine.lockfile"): "Plan.lock",
    ("engine.lock", "engine.drift"): "Lock.drift and Lock.plan, which look at the machine",
    ("engine.lock", "engine.check"): "Lock.check, the same",
    ("engine.plan", "engine.run.load"): "Plan.load and Plan.apply, doors to the torch edge",
    ("engine.plan", "engine.run.generate"): "Plan.run, a door to the torch edge",
    ("engine.plan", "engine.run.media"): "the type of what Plan.run yields",
}
HEAVY = {"torch", "diffusers", "transformers", "accelerate"}
EDGE = ("engine.optimizers.", "engine.run.")
# Torch itself through and through, and imported by nothing before a dry run is asked for.
TORCH = ("engine.dryrun.",)


def _modules() -> dict[str, Path]:
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def _imports(path: Path, known: set[str]) -> Iterator[tuple[str, int]]:
    """Yield (module, column) of every import, those inside functions and under TYPE_CHECKING included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.col_offset) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield (full if full in known else node.module), node.col_offset


def test_every_module_has_its_layer() -> None:
    assert sorted(_modules()) == sorted(LAYERS)


def test_modules_import_only_from_earlier_layers() -> None:
    place = {name: i for i, name in enumerate(LAYERS)}
    upward = set()
    for name, path in _modules().items():
        for imported, _ in _imports(path, set(LAYERS)):
            if imported in place and place[imported] > place[name]:
                upward.add((name, imported))
    assert upward == set(UPWARD)


def test_torch_is_imported_only_at_the_edge_and_only_inside_functions() -> None:
    wrong = []
    for name, path in _modules().items():
        for imported, column in _imports(path, set()):
            if name.startswith(TORCH):
                continue
            if imported.partition(".")[0] in HEAVY and (column == 0 or not name.startswith(EDGE)):
                wrong.append((name, imported))
    assert wrong == []


def _fresh(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    return done.stdout


def test_importing_engine_loads_nothing_heavy() -> None:
    loaded = set(json.loads(_fresh("import sys, json, engine; print(json.dumps(sorted(sys.modules)))")))
    assert not loaded & (HEAVY | {"pynvml", "yaml", "jsonschema", "numpy", "huggingface_hub"})


def test_a_warm_resolve_loads_neither_torch_nor_jsonschema() -> None:
    code = "import sys, json, engine; engine.resolve(device='cpu'); print(json.dumps(sorted(sys.modules)))"
    _fresh(code)  # the first validates the shipped files, and remembers that it did
    assert not set(json.loads(_fresh(code))) & (HEAVY | {"jsonschema", "numpy", "huggingface_hub"})


def test_the_public_names_are_those_listed() -> None:
    import engine

    for name in engine.__all__:
        assert getattr(engine, name) is not None
    assert dir(engine) == sorted(engine.__all__)

"""How long it takes to know what would be run: `python -m bench.startup [--runs N]`.

Prints the median and the spread of: importing engine, a probe (the real pynvml against the tests' stub library with
eight cards), a resolve in a warm process (of the embedded model, and of FLUX.1-dev with estimates), `dg-run plan` as
a whole process, two hundred profiles beside the built-in ones, and a hundred warm requests, beside a bare interpreter.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from tests import nvml_stub

ROOT = Path(__file__).parents[1]
MODEL, CARD = "black-forest-labs/FLUX.1-dev", "RTX 4090"
REQUEST = {"model": MODEL, "hardware": {"gpu": CARD, "host_ram": "64GiB"}}
INSIDE = """
import time, statistics, sys
{setup}
times = []
for _ in range({runs}):
    start = time.perf_counter()
    {call}
    times.append(time.perf_counter() - start)
print(*times)
"""


def _environment(folder: Path) -> dict[str, str]:
    library = nvml_stub.compile_stub(folder)
    topology = folder / "topology"
    topology.write_text(nvml_stub.lines(nvml_stub.topology("eight-linked-cards")), encoding="utf-8")
    # An installed copy has its bytecode; a developer's shell may forbid Python to keep any.
    given = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    return given | {
        "PYTHONPYCACHEPREFIX": str(folder / "bytecode"),
        "LD_LIBRARY_PATH": str(library.parent),
        "NVML_STUB_FILE": str(topology),
        "PYTHONPATH": str(ROOT),
        "DG_RUN_CACHE": str(folder / "cache"),
    }


def _inside(setup: str, call: str, runs: int, environment: dict[str, str]) -> list[float]:
    """Return the seconds of each call within one process."""
    code = INSIDE.format(setup=setup, call=call, runs=runs)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return [float(t) for t in done.stdout.split()]


def _whole(command: list[str], runs: int, environment: dict[str, str]) -> list[float]:
    """Return the seconds of each run of a whole process."""
    import time

    times = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        subprocess.run(command, env=environment, capture_output=True, check=True)
        times.append(time.perf_counter() - start)
    return times[1:]  # the first fills the caches


def _many_profiles(folder: Path) -> Path:
    """Write two hundred profiles of a team, children of the built-in ones, and return the folder above them."""
    (folder / "team" / "profiles").mkdir(parents=True)
    for i in range(200):
        parent = ("extreme-low", "low", "medium", "hi-res")[i % 4]
        text = (
            f"schema: dg-run/profile@1\nname: team-{i}\nversion: 1.0.0\nsummary: one of many\nextends: {parent}\n"
            f"match: {{free_vram: {{at_least: {4 + i % 20}GiB}}}}\n"
        )
        (folder / "team" / "profiles" / f"team-{i}.yaml").write_text(text, encoding="utf-8")
    return folder / "team"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=20)
    runs = parser.parse_args().runs
    with tempfile.TemporaryDirectory() as name:
        environment = _environment(Path(name))
        python = [sys.executable]
        requests = Path(name) / "requests.jsonl"
        requests.write_text("".join(f"{json.dumps({'id': i} | REQUEST)}\n" for i in range(100)), encoding="utf-8")
        rows: dict[str, Callable[[], list[float]]] = {
            "python -c pass": lambda: _whole([*python, "-c", "pass"], runs, environment),
            "python -c 'import engine'": lambda: _whole([*python, "-c", "import engine"], runs, environment),
            "probe, 8 cards": lambda: _inside("from engine import probe", "probe.snapshot()", runs, environment),
            "engine.resolve, warm": lambda: _inside(
                "import engine; engine.resolve()", "engine.resolve()", runs, environment
            ),
            "engine.resolve, FLUX.1-dev": lambda: _inside(
                f"import engine; ask = lambda: engine.resolve({MODEL!r}, gpu={CARD!r}); ask()",
                "ask()",
                runs,
                environment,
            ),
            "the same, 200 profiles": lambda: _inside(
                f"import engine, os; os.chdir({str(_many_profiles(Path(name)))!r});"
                f" ask = lambda: engine.resolve({MODEL!r}, gpu={CARD!r}); ask()",
                "ask()",
                runs,
                environment,
            ),
            "dg-run plan": lambda: _whole([*python, "-m", "engine", "plan"], runs, environment),
            "dg-run plan, FLUX.1-dev": lambda: _whole(
                [*python, "-m", "engine", "plan", "--model", MODEL, "--gpu", CARD], runs, environment
            ),
            "a hundred warm requests": lambda: _whole(
                [*python, "-m", "engine", "plan", "--requests", str(requests)], max(2, runs // 5), environment
            ),
        }
        base = None
        print(f"{'':<28} {'median':>10} {'min':>10} {'max':>10}   ratio to a bare interpreter")
        for label, measure in rows.items():
            times = measure()
            median = statistics.median(times)
            base = base or median
            print(
                f"{label:<28} {median * 1e3:>7.1f} ms {min(times) * 1e3:>7.1f} ms {max(times) * 1e3:>7.1f} ms"
                f"   {median / base:.2f}"
            )


if __name__ == "__main__":
    main()

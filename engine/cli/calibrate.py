"""`dg-run calibrate`: measure this machine's card once; later plans use what was found."""

from __future__ import annotations

from engine import calibration, cards, history, probe
from engine.calibration import Calibration
from engine.cli import options
from engine.errors import FileError, HardwareError, UsageError
from engine.estimate import assumed
from engine.probe import nvml
from engine.run.progress import OnStderr
from engine.units import format_seconds
from engine.values import Gpu, Hardware, Request
from engine.words import listing

_BUSY_PERCENT = 10


def parser() -> options.Parser:
    """Return the parser of `dg-run calibrate`."""
    made = options.Parser(
        "dg-run calibrate",
        "Measure this machine's card, in under a minute: what it computes and copies in a second, how fast the host\n"
        "starts work, and what CUDA takes beside tensors. Later plans for the card use what was measured, until the\n"
        "driver, torch, CUDA or cuDNN changes. Close what else computes on the card: it would be measured too.",
        epilog="Without it plans use the published rates of the card, and say that they are not calibrated.",
    )
    made.add_argument("--gpu", metavar="NAME", help="index, UUID or name of the card (default: the most free one)")
    made.add_argument("--json", action="store_true", help="print what was measured as JSON, and no table")
    made.add_argument(
        "--forget",
        action="store_true",
        help="measure nothing; drop what was measured and the remembered runs, of --gpu or of every card",
    )
    made.add_argument("--debug", action="store_true", help="show tracebacks")
    return made


def run(arguments: list[str]) -> int:
    """Measure, keep, and show what changes."""
    given = parser().read(arguments)
    if given.forget:
        if given.json:
            raise UsageError("--forget measures nothing, so there is no --json", do="leave one of them out")
        return _forget(given.gpu)
    told = OnStderr()
    card, made = _measured(given.gpu, told)
    where = calibration.keep(made)
    if given.json:
        print(made.to_json(), end="")
    else:
        _print(card, made)
    told.say(f"kept in {where.parent}; later plans for this card use it")
    return 0


def _card(name: str | None) -> tuple[Gpu, Hardware]:
    """Return the card that is meant, which is here. Raises: HardwareError, UsageError."""
    seen = probe.snapshot()
    if seen.gpus:
        seen = cards.snapshot(Request(model="", gpu=name), seen)
    card = cards.chosen(Request(model="", gpu=name), seen)
    if card is None:
        fault = seen.faults[0] if seen.faults else None
        raise HardwareError(
            "there is no card to calibrate",
            fault.what if fault else seen.no_gpu_because or "",
            fault.do if fault else "run `dg-run doctor`; plans for the CPU need no calibration",
        )
    if card.hypothetical:
        here = listing(f"{g.index}: {g.name}" for g in probe.snapshot().gpus)
        raise UsageError(f"{name} is not here", "only a card that is here can be measured", f"name one of {here}")
    if card.uuid is None:
        because = card.unknown.get("uuid", "it has none")
        raise HardwareError(
            f"{card.name} cannot be calibrated", f"its UUID is not known: {because}", "update the driver"
        )
    return card, seen


def _measured(name: str | None, told: OnStderr) -> tuple[Gpu, Calibration]:
    """Return a card and what was measured of it, while no other dg-run starts on it."""
    from engine.run import device, interrupt, lock, measure
    from engine.run.accelerator import Cuda

    meant = _card(name)[0]
    with lock.held(meant, told.say):
        card, seen = _card(meant.uuid)  # read again: whoever was waited for has changed what is free
        assert card.uuid is not None
        neighbours = _neighbours(card)
        if neighbours is not None:
            told.say(f"warning: {neighbours}; what is measured now is disturbed by it")
        with told.stage("starting torch"), interrupt.held_back():
            device.make_visible(card.uuid)
        on = Cuda(card.uuid, card.free_bytes, is_alone=neighbours is None and not card.processes)
        return card, measure.measure(on, card, seen.driver, told, disturbed=neighbours is not None)


def _neighbours(card: Gpu) -> str | None:
    """Return who computes on the card, as far as the driver tells; None where nobody does."""
    busy = nvml.moment(card.uuid or "").busy_percent
    names = listing(dict.fromkeys(p.name or "a process" for p in card.processes[:4]))
    if busy is not None and busy > _BUSY_PERCENT:
        return f"{card.name} is busy {busy} % of the time" + (f" (used by {names})" if names else "")
    if busy is None and names:
        return f"{card.name} is used by {names}, and how busy it is is not told"
    return None


def _forget(name: str | None) -> int:
    if name is None:
        found = [*calibration.folder().glob("*.json"), *history.folder().glob("*.jsonl")]
    else:
        uuid = _card(name)[0].uuid or ""
        found = [p for p in (calibration.path(uuid), history.path(uuid)) if p.exists()]
    try:
        for each in found:
            each.unlink(missing_ok=True)
    except OSError as error:
        raise FileError(f"{error.filename} cannot be deleted", str(error.strerror or error)) from None
    told = [
        f"the {what} of {count} {'card' if count == 1 else 'cards'}"
        for what, suffix in (("calibrations", ".json"), ("remembered runs", ".jsonl"))
        if (count := sum(p.suffix == suffix for p in found))
    ]
    print(f"dropped {listing(told)}" if told else "nothing was there")
    return 0


def _print(card: Gpu, made: Calibration) -> None:
    print(f"{card.index}: {card.name}, measured in {format_seconds(made.took_seconds)}\n")
    print(f"  {'':<24} {'measured':>16} {'assumed before':>16}  {'ratio':>6}")
    for row in assumed.rows(card, made):
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        print(f"  {row.name:<24} {row.measured:>16} {row.assumed:>16}  {ratio:>6}".rstrip())

"""`engine.resolve`: from a request to a plan."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from engine import arguments, calibration, cards, facts, history, plan, profiles, solver, versions
from engine.arguments import StepLike
from engine.errors import HardwareError, ModelError, NothingFitsError, UsageError
from engine.estimate.estimator import Estimator
from engine.facts.model import Component, Model
from engine.plan import Plan
from engine.values import Device, FrozenDict, Hardware, Note, ProfileRef, Request
from engine.words import did_you_mean

if TYPE_CHECKING:
    from engine.estimate.timeline import Timeline

_GUIDANCE_NOTE = Note(
    kind="no_effect",
    optimizer=None,
    because="guidance does nothing: this model has no guidance embeddings; true_cfg_scale in the call guides it",
)


def resolve(
    model: Any = None,
    *,
    height: int | None = None,
    width: int | None = None,
    frames: int | None = None,
    batch: int = 1,
    steps: int | None = None,
    guidance: float | None = None,
    call: Mapping[str, Any] | None = None,
    components: Mapping[str, None] | None = None,
    pipeline_class: str | None = None,
    vram: int | str | None = None,
    host_ram: int | str | None = None,
    gpu: int | str | None = None,
    headroom: int | str | None = None,
    profile: str | None = None,
    optimizers: Sequence[StepLike] | None = None,
    require: Iterable[StepLike] = (),
    forbid: Iterable[str] = (),
    quality: str = "near",
    prefer: str = "speed",
    prompts_known: bool = False,
    device: str | None = None,
    hardware: Hardware | None = None,
    told: Callable[[str], None] | None = None,
) -> Plan:
    """Return the plan for a request on this machine.

    `model` is None (the embedded one), a directory, a name on the hub, or a pipeline object. Sizes are pixels; `vram`,
    `host_ram` and `headroom` are bytes or text such as "12GiB". With `optimizers` the list is exact, else a profile is
    chosen (`profile` names the only one allowed). `components` names parts that are not loaded
    (`{"text_encoder_2": None}`: what it would give is handed in), `pipeline_class` another class of diffusers for the
    same components. `device="cpu"` leaves a card alone; `hardware` replaces the probe. `told` is given a line before
    something that takes seconds: the first dry run of a model at a size.

    When nothing fits it raises nothing: `plan.fits` is false, and `plan.rejected` says why.

    Raises: UsageError, ProfileError, IncompatibleError, ModelError, HardwareError.

    >>> plan = resolve(height=128, width=128, device="cpu")
    >>> plan.profile.name, plan.fits
    ('cpu', None)
    """
    if optimizers is not None and profile is not None:
        raise UsageError("a profile and an exact list of optimizers were given", do="give one of them")
    known = _changed(_model(model), components or {}, pipeline_class)
    sizes = {"height": height, "width": width, "frames": frames, "steps": steps, "guidance": guidance}
    request = _request(
        known,
        optimizers is not None,
        sizes,
        batch=arguments.count("batch", batch, arguments.MAX_BATCH) or 1,
        call=FrozenDict(arguments.plain("call", {**known.defaults.call, **(call or {})})),
        components=FrozenDict(components or {}),
        device=arguments.choice("device", device, arguments.DEVICES),
        gpu=None if gpu is None else str(gpu),
        vram_bytes=arguments.size("vram", vram),
        host_ram_bytes=arguments.size("host_ram", host_ram),
        headroom_bytes=arguments.size("headroom", headroom),
        profile=profile,
        require=tuple(map(arguments.step, require)),
        forbid=arguments.optimizer_names(forbid),
        quality=arguments.choice("quality", quality, arguments.QUALITIES) or "near",
        prefer=arguments.choice("prefer", prefer, arguments.PREFERENCES) or "speed",
        prompts_known=prompts_known,
    )
    arguments.refuse_bad_sizes(request, known)
    arguments.refuse_contradictions(request, sizes, call or {}, optimizers)
    seen = cards.snapshot(request, hardware)
    card = cards.chosen(request, seen)
    headroom_bytes = None if card is None else cards.headroom_bytes(request, card)
    budget_bytes = None
    if card is not None and card.free_bytes is not None and headroom_bytes is not None:
        budget_bytes = max(0, card.free_bytes - headroom_bytes)
    calibrated = calibration.find(card, seen.driver)
    measured = calibrated.calibration
    estimates = Estimator(
        known,
        request,
        card,
        budget_bytes,
        told,
        calibration=measured,
        runs=history.comparable(card, seen.driver, measured),
    )
    situation = solver.Situation(
        request=request,
        model=known,
        gpu=card,
        estimate=estimates,
        budget_bytes=budget_bytes,
        host_budget_bytes=None if card is None else seen.host.ram_bytes,
    )
    if optimizers is not None:
        decision = solver.exact(situation, [arguments.step(s) for s in optimizers])
    else:
        decision = solver.choose(situation, profiles.built_in() if profile is None else (profiles.find(profile),))
    estimates.save()
    notes = decision.notes
    if guidance is not None and known.ignores_guidance:
        notes = (*notes, _GUIDANCE_NOTE)
    if estimates.because is not None:
        notes = (*notes, Note(kind="not_estimated", optimizer=None, because=estimates.because))
    notes = (*notes, *_learnt(calibrated, estimates.remembered(decision.steps, decision.estimate)))
    taken = decision.profile
    reference = None if taken is None else ProfileRef(name=taken.name, version=taken.version, source=taken.source)
    return Plan(
        request=request,
        hardware=seen,
        device=None if card is None else Device(uuid=card.uuid, index=card.index),
        profile=reference,
        optimizers=decision.steps,
        estimate=decision.estimate,
        budget_bytes=budget_bytes,
        headroom_bytes=headroom_bytes,
        fits=decision.fits,
        rejected=decision.rejected,
        notes=notes,
        digest=plan.digest(request, reference, decision.steps),
        versions=FrozenDict(versions.snapshot()),
    )


def _learnt(calibrated: calibration.Found, kinds: int | None) -> Iterator[Note]:
    """Yield what a person should know of the calibration and the remembered runs behind an estimate."""
    if calibrated.dropped is not None:
        yield Note(kind="calibration", optimizer=None, because=calibrated.dropped)
    if calibrated.calibration is not None and calibrated.calibration.disturbed:
        because = f"the card was calibrated while another program computed on it; when none does, {calibration.AGAIN}"
        yield Note(kind="calibration", optimizer=None, because=because)
    if kinds is not None:
        because = f"the interval is that of {kinds} different runs on this card, measured against their predictions"
        yield Note(kind="remembered", optimizer=None, because=because)


def timeline(made: Plan, told: Callable[[str], None] | None = None) -> Timeline:
    """Return what is on the card along the run that a plan describes. `told` as for `resolve`.

    Raises: NothingFitsError, HardwareError, ModelError: why there is none.
    """
    if not made.optimizers:
        raise NothingFitsError("there is no timeline", "nothing fits, so there is no run", "list optimizers (--exact)")
    request = made.request
    known = _changed(facts.find(request.model, request.revision), request.components, request.pipeline_class)
    measured = calibration.find(made.card, made.hardware.driver).calibration if made.estimate.calibrated else None
    estimates = Estimator(known, request, made.card, made.budget_bytes, told, calibration=measured)
    found = estimates.timeline(made.optimizers)
    if found is None:
        because = estimates.because or ""
        if made.card is None or made.card.compute_capability is None:
            raise HardwareError("there is no timeline", because, 'plan for a card by name: --gpu "RTX 4090"')
        raise ModelError("there is no timeline", because)
    return found


def _changed(known: Model, components: Mapping[str, None], pipeline_class: str | None) -> Model:
    """Return a model under the pipeline class that was asked for. Raises: UsageError, for parts it does not have."""
    for name, value in components.items():
        if name not in known.components:
            raise UsageError(f"{known.id} has no component {name!r}", do=did_you_mean(name, known.components))
        if value is not None:
            raise UsageError(f"component {name!r} can only be left out", do=f'write {{"{name}": null}}')
    if pipeline_class is not None and not isinstance(pipeline_class, str):
        raise UsageError(f"pipeline_class must be the name of a class, not {pipeline_class!r}")
    return known if pipeline_class is None else dataclasses.replace(known, pipeline_class=pipeline_class)


def _request(known: Model, is_exact: bool, asked: Mapping[str, Any], **checked: Any) -> Request:
    """Return the request: what was asked for, and the model's own defaults where nothing was."""

    def wanted(name: str) -> Any:
        return getattr(known.defaults, name) if asked[name] is None else asked[name]

    return Request(
        model=known.id,
        revision=known.revision,
        pipeline_class=known.pipeline_class,
        exact=is_exact,
        height=arguments.count("height", wanted("height"), arguments.MAX_SIDE_PX),
        width=arguments.count("width", wanted("width"), arguments.MAX_SIDE_PX),
        frames=arguments.count("frames", wanted("frames"), arguments.MAX_FRAMES),
        steps=arguments.count("steps", wanted("steps"), arguments.MAX_STEPS),
        guidance=arguments.number("guidance", wanted("guidance")),
        **checked,
    )


def _model(model: Any) -> Model:
    if model is None or isinstance(model, str):
        return facts.find(model)
    if hasattr(model, "__fspath__"):
        return facts.find(str(model))
    if hasattr(model, "components") and hasattr(model, "config"):
        return _of_pipeline(model)
    raise UsageError(
        f"a {type(model).__name__} is not a model", do="give a directory, a name on the hub, or a diffusers pipeline"
    )


def _of_pipeline(pipe: Any) -> Model:
    """Return what is known of a pipeline object, from the configurations it carries."""

    def config(part: Any) -> dict[str, Any]:
        own = getattr(part, "config", {})
        return dict(own.to_dict() if hasattr(own, "to_dict") else own)

    return Model(
        id=str(getattr(pipe, "name_or_path", None) or pipe.config.get("_name_or_path") or type(pipe).__name__),
        source="pipeline",
        pipeline_class=type(pipe).__name__,
        components=FrozenDict(
            {
                n: Component(
                    library=type(c).__module__.partition(".")[0], cls=type(c).__name__, config=FrozenDict(config(c))
                )
                for n, c in pipe.components.items()
                if hasattr(c, "config")
            }
        ),
    )

"""`engine.resolve`: from a request to a plan."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from engine import arguments, calibration, cards, facts, history, pictures, plan, profiles, solve, versions
from engine.arguments import StepLike
from engine.errors import HardwareError, ModelError, NothingFitsError, UsageError
from engine.estimate.estimator import Estimator
from engine.facts import from_picture
from engine.facts.loras import LoraLike
from engine.facts.loras import read as read_loras
from engine.facts.model import Component, Model
from engine.plan import Plan
from engine.units import format_size
from engine.values import Device, FrozenDict, Gpu, Hardware, Note, Profile, ProfileRef, Request, Step
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
    loras: Iterable[LoraLike] = (),
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
    prefer: str | None = None,
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
    same components. `loras` are fused into the weights while they are loaded: "PATH", "PATH:weight" or (path, weight),
    of a file in safetensors, a folder with one, or OWNER/MODEL on the hub. `device="cpu"` leaves a card alone;
    `hardware` replaces the probe. `told` is given a line before something that takes seconds: the first dry run of a
    model at a size.

    `image` in the call is a picture to begin with: the path of a file, an image of PIL, or only its `width` and
    `height` in pixels. The pipeline is then the one that begins with a picture, and the size is the picture's where
    none is given. The plan keeps the size alone, and `Plan.run` is given the picture again.

    When nothing fits it raises nothing: `plan.fits` is false, and `plan.rejected` says why.

    Raises: UsageError, ProfileError, IncompatibleError, ModelError, HardwareError; FileError, for an `image`.

    >>> plan = resolve(height=128, width=128, device="cpu")
    >>> plan.profile.name, plan.fits
    ('cpu', None)
    """
    if optimizers is not None and profile is not None:
        raise UsageError("a profile and an exact list of optimizers were given", do="give one of them")
    known = _changed(_model(model), components or {}, pipeline_class)
    sizes = {"height": height, "width": width, "frames": frames, "steps": steps, "guidance": guidance}
    begun: tuple[Note, ...] = ()
    if (image := (call or {}).get("image")) is not None:
        known, sizes, call, begun = _from_picture(known, sizes, call or {}, image)
    chain = () if profile is None else profiles.chain(profile)
    request = _request(
        known,
        optimizers is not None,
        sizes,
        batch=arguments.count("batch", batch, arguments.MAX_BATCH) or 1,
        call=FrozenDict(arguments.plain("call", {**known.defaults.call, **(call or {})})),
        components=FrozenDict(components or {}),
        loras=read_loras(loras, known),
        device=arguments.choice("device", device, arguments.DEVICES),
        gpu=None if gpu is None else str(gpu),
        vram_bytes=arguments.size("vram", vram),
        host_ram_bytes=arguments.size("host_ram", host_ram),
        headroom_bytes=arguments.size("headroom", headroom),
        profile=profile,
        require=tuple(map(arguments.step, require)),
        forbid=arguments.optimizer_names(forbid),
        quality=arguments.choice("quality", quality, arguments.QUALITIES) or "near",
        # What a profile prefers counts where it is asked for by name.
        prefer=arguments.choice("prefer", prefer, arguments.PREFERENCES)
        or (chain[0].prefer if chain else None)
        or "speed",
        prompts_known=prompts_known,
    )
    arguments.refuse_bad_sizes(request, known)
    arguments.refuse_bad_strength(request)
    arguments.refuse_contradictions(request, sizes, call or {}, optimizers)
    listed = None if optimizers is None else tuple(map(arguments.step, optimizers))
    notes = (*begun, _GUIDANCE_NOTE) if guidance is not None and known.ignores_guidance else begun
    found = None
    if listed is None and not chain:
        found = profiles.listed()
        notes = (*notes, *_passed_over(found))
    return _solved(known, request, cards.snapshot(request, hardware), listed, chain, notes, told, found=found)


def _passed_over(found: Sequence[profiles.Listed]) -> Iterator[Note]:
    """Yield the profiles that would be tried here if they were valid."""
    for one in profiles.broken(found):
        because = (
            f"profile {one.name} is not valid, and nothing is tried in its place: dg-run profiles lint {one.source}"
        )
        yield Note(kind="broken_profile", optimizer=None, because=because)


def again(
    made: Plan,
    request: Request,
    hardware: Hardware,
    told: Callable[[str], None] | None = None,
    *,
    below_bytes: int | None = None,
    may_run: bool = True,
) -> Plan:
    """Return the plan for another request or machine than `made` is for, all else as it was. Raises: as `resolve`.

    `below_bytes`: only what needs less than that of the card, up to the upper end of its interval, is chosen. Without
    `may_run` a dry run that was not made yet is not made: `engine.estimate.store.NotTraced`.
    """
    request = _fitted(request)
    chain = () if request.profile is None else profiles.chain(request.profile)
    listed = made.optimizers if request.exact else None
    return _solved(
        model_of(request), request, hardware, listed, chain, (), told, below_bytes=below_bytes, may_run=may_run
    )


def least_free_vram(made: Plan) -> int:
    """Return the free VRAM from which on a plan may be chosen at all: by its profile, and by what ran out of memory."""
    asked = 0 if made.profile is None else _profile_of(made.profile).match.free_vram_at_least_bytes or 0
    lost = history.ran_out(made.card, made.hardware.driver, made.request).get(history.text_of(made.acting))
    return max(asked, 0 if lost is None else lost.room_bytes + 1 + (made.headroom_bytes or 0))


def could_stay(made: Plan, told: Callable[[str], None] | None = None) -> bool:
    """Return whether the weights alone leave room on a plan's card, in the dtype that it computes in."""
    dtype = next((str(s.params["value"]) for s in made.optimizers if s.name == "dtype"), "float32")
    estimates = Estimator(model_of(made.request), made.request, made.card, made.budget_bytes, told)
    return made.budget_bytes is None or sum(estimates.sizes(dtype).values()) < made.budget_bytes


def _profile_of(reference: ProfileRef) -> Profile:
    return profiles.find(reference.name if reference.source == profiles.BUILT_IN else reference.source)


def model_of(request: Request) -> Model:
    """Return what is known of a request's model. Raises: ModelError."""
    return _changed(facts.find(request.model, request.revision), request.components, request.pipeline_class)


def _solved(
    known: Model,
    request: Request,
    seen: Hardware,
    listed: Sequence[Step] | None,
    chain: Sequence[Profile],
    notes: Sequence[Note],
    told: Callable[[str], None] | None,
    *,
    found: Sequence[profiles.Listed] | None = None,
    below_bytes: int | None = None,
    may_run: bool = True,
) -> Plan:
    """Return the plan. `found` are the profiles of a free search, where they were looked for just now."""
    free = profiles.visible(found) if listed is None and not chain else ()
    tried = [
        _Case(request, known, card, seen, told, below_bytes=below_bytes, may_run=may_run)
        for card in cards.candidates(request, seen)
    ]
    for case in tried:
        case.decide(listed, chain, free)
    taken = tried[solve.better([c.decision for c in tried])]
    return taken.plan([c for c in tried if c is not taken], notes)


class _Case:
    """A request on one of the cards that are here (None: on none), and what is decided for it."""

    def __init__(
        self,
        request: Request,
        known: Model,
        card: Gpu | None,
        seen: Hardware,
        told: Callable[[str], None] | None,
        *,
        below_bytes: int | None,
        may_run: bool,
    ) -> None:
        self.request, self.known, self.card, self.seen, self.below_bytes = request, known, card, seen, below_bytes
        self.headroom_bytes = None if card is None else cards.headroom_bytes(request, card)
        self.budget_bytes = None
        if card is not None and card.free_bytes is not None and self.headroom_bytes is not None:
            self.budget_bytes = max(0, card.free_bytes - self.headroom_bytes)
        self.calibrated = calibration.find(card, seen.driver)
        measured = self.calibrated.calibration
        runs = history.comparable(card, seen.driver, measured)
        self.estimates = Estimator(
            known, request, card, self.budget_bytes, told, calibration=measured, runs=runs, may_run=may_run
        )
        self.decision: solve.Decision

    def decide(self, listed: Sequence[Step] | None, chain: Sequence[Profile], free: Sequence[Profile]) -> None:
        """Decide: for an exact list, for a named profile and its fallbacks, or among all that are free to be chosen.

        Raises: DgRunError.
        """
        situation = solve.Situation(
            request=self.request,
            model=self.known,
            gpu=self.card,
            estimate=self.estimates,
            least=self.estimates.least,
            timed=self.estimates.timed,
            sizes=self.estimates.sizes,
            budget_bytes=self.budget_bytes,
            below_bytes=self.below_bytes,
            ran_out=history.ran_out(self.card, self.seen.driver, self.request),
            host_budget_bytes=None if self.card is None else self.seen.host.ram_bytes,
            gpus=len(self.seen.gpus),
            platform=self.seen.host.platform,
        )
        if listed is not None:
            self.decision = solve.exact(situation, listed)
        elif chain:
            self.decision = solve.named(situation, chain)
        else:
            self.decision = solve.choose(situation, free)
        self.estimates.save()

    def plan(self, others: Sequence[_Case], notes: Sequence[Note]) -> Plan:
        """Return the plan, with these notes; `others` are the cases of the cards that were not taken."""
        decision, request = self.decision, self.request
        reference = None
        if (taken := decision.profile) is not None:
            reference = ProfileRef(name=taken.name, version=taken.version, source=taken.source)
        return Plan(
            request=request,
            hardware=self.seen,
            device=None if self.card is None else Device(uuid=self.card.uuid, index=self.card.index),
            profile=reference,
            optimizers=decision.steps,
            estimate=decision.estimate,
            budget_bytes=self.budget_bytes,
            headroom_bytes=self.headroom_bytes,
            fits=decision.fits,
            rejected=decision.rejected,
            notes=(*decision.notes, *notes, *self._notes(), *(self._beside(other) for other in others)),
            digest=plan.digest(request, reference, decision.steps),
            versions=FrozenDict(versions.snapshot()),
        )

    def _notes(self) -> Iterator[Note]:
        if self.estimates.because is not None:
            yield Note(kind="not_estimated", optimizer=None, because=self.estimates.because)
        yield from self._disk()
        kinds = self.estimates.remembered(self.decision.steps, self.decision.estimate)
        yield from _learnt(self.calibrated, kinds)

    def _disk(self) -> Iterator[Note]:
        """Yield what happens where the files of the weights do not stay in memory between the steps that read them."""
        taken, ram = self.decision.estimate, self.seen.host.ram_bytes
        reads = next((s.name for s in self.decision.steps if s.name in ("sequential_offload", "group_offload")), None)
        file_bytes, held = taken.host.file_bytes, taken.host_bytes
        if reads is None or ram is None or not file_bytes or held is None or file_bytes <= ram - held:
            return
        because = (
            f"{format_size(file_bytes)} of weights stay in their files, and {format_size(ram - held)} of memory is left"
            " for them: what does not stay there is read from the disk again whenever it is used, which the seconds do"
            " not count"
        )
        yield Note(kind="degrades", optimizer=reads, because=because)

    def _beside(self, other: _Case) -> Note:
        """Return why another card was not taken."""
        assert other.card is not None
        name, theirs, ours = f"{other.card.index}: {other.card.name}", other.decision, self.decision
        if theirs.fits is False:
            because = f"nothing fits on card {name}"
        elif theirs.estimate.seconds is None or ours.estimate.seconds is None:
            because = f"card {name} has less room"
        else:
            because = (
                f"on card {name} it would take {theirs.estimate.seconds:.2f} s, here {ours.estimate.seconds:.2f} s"
            )
        return Note(kind="other_card", optimizer=None, because=because)


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
    known = model_of(request)
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
    if pipeline_class in (None, known.pipeline_class):
        return known  # itself, by which what is known of it is found again
    return dataclasses.replace(known, pipeline_class=pipeline_class)


def _from_picture(
    known: Model, sizes: Mapping[str, Any], call: Mapping[str, Any], image: Any
) -> tuple[Model, dict[str, Any], dict[str, Any], tuple[Note, ...]]:
    """Return model, sizes and call of a run that begins with a picture, and what is done to the picture.

    Raises: UsageError, for a model that cannot begin with one; FileError, for a file that is none.
    """
    made_by = from_picture.pipeline_for(known.pipeline_class)
    if made_by is None:
        raise UsageError(
            f"{known.pipeline_class} does not begin with a picture",
            "diffusers has no pipeline that does so with the components of this model",
            "leave the image out, or take another model (FLUX, Stable Diffusion, Qwen-Image, …)",
        )
    known = dataclasses.replace(known, pipeline_class=made_by)
    picture = None if isinstance(image, Mapping) else pictures.read(image)
    size = arguments.picture_size(image) if picture is None else picture.size
    sizes = dict(sizes)
    if from_picture.is_fitted(made_by):
        usual = known.defaults
        most = usual.height * usual.width if usual.height and usual.width else None
        high, wide = (
            arguments.count(n, call.get(n) if sizes[n] is None else sizes[n], arguments.MAX_SIDE_PX)
            for n in ("height", "width")
        )
        sizes["height"], sizes["width"] = pictures.size_to_draw(size, high, wide, known.size_multiple, most)
        size = sizes["width"], sizes["height"]
    taken = dict(zip(pictures.SIZE, size, strict=True))
    told = () if picture is None else (Note(kind="image", optimizer=None, because=pictures.told(picture, taken)),)
    return known, sizes, {**call, "image": FrozenDict(taken)}, told


def _fitted(request: Request) -> Request:
    """Return a request whose picture is of the size that is drawn, where it has to be."""
    size = {"width": request.width, "height": request.height}
    if "image" not in request.call or not from_picture.is_fitted(request.pipeline_class or "") or None in size.values():
        return request
    return dataclasses.replace(request, call=FrozenDict({**request.call, "image": FrozenDict(size)}))


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

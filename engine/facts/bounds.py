"""Whether a configuration can be that of a model at all: plain checks of its numbers, before anything is built from it.

A dry run builds a model on `meta`, where a width costs nothing and a layer costs a millisecond. So a billion layers
would never end, a width of 10^9 overflows, and a configuration may ask the libraries to fetch code. Bounds are some ten
times above the largest open models, and every number that is refused is named.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from engine.errors import ModelError

MAX_DEPTH = 16
MAX_ENTRIES = 100_000
MAX_LAYERS = 500
MAX_BLOCKS = 1_000
MAX_EXPERT_BLOCKS = 20_000
MAX_WIDTH = 2**20
MAX_SIDE = 2**14
MAX_NUMBER = 2**31
MAX_PARAMETERS = 10**13

_COUNT = re.compile(r"(?:.*_)?(?:layers|blocks|depths?|layers?_per_block)\Z|n_layer\Z")
_PER_BLOCK = re.compile(r".*_per_block\Z")
_STAGES = re.compile(r".*(?:_types|channels|mult|depths)\Z")
_WIDTH = re.compile(
    r"(?:.*_)?(?:dims?|channels|heads|width|positions|embeddings|features|experts|registers|buckets|size|factor)\Z"
    r"|d_(?:model|ff|kv)\Z"
)
# Tables of these sizes are computed for real, a scheduler's among them.
_SIDE = re.compile(
    r"(?:sample|image|patch|kernel)_size\Z|pos_embed_max_size\Z"
    r"|(?:.*_)?(?:resolution|kernel|timesteps|steps|order|ratio|multiplier|expand)\Z"
)
_NEVER_BELOW_ONE = re.compile(
    r"(?:num_|n_)?(?:hidden_layers|layers|layer|attention_heads|heads)\Z|d_(?:model|ff|kv)\Z|layers_per_block\Z"
    r"|(?:hidden|intermediate|vocab|patch)_size\Z|(?:in|out|latent)_channels\Z|attention_head_dim\Z"
)
_INNER = re.compile(r"(?:hidden_size|d_model|dim|inner_dim|n_embd|model_dim)\Z")
_EXPERTS = re.compile(r"(?:.*_)?experts\Z")
# Token ids, wave lengths and the like count nothing that is built.
_FREE = re.compile(r".*(?:theta|_ids?|index|indexes|token|seed|length|base|freq)\Z|_.*")
_FETCHED_CODE = re.compile(r".*(?:implementation|kernels?)\Z")
_FETCHED_WEIGHTS = ("use_pretrained_backbone", "use_timm_backbone")


def check(config: Mapping[str, Any], model: str, component: str) -> None:
    """Return when a component can be built from its configuration. Raises: ModelError, naming what is absurd."""
    refusal = _Refusal(model, component)
    seen = 0
    parameters = 0.0
    for depth, mapping in _mappings(config):
        if depth > MAX_DEPTH:
            raise refusal(f"it is nested more than {MAX_DEPTH} deep")
        for key, value in mapping.items():
            seen += 1 + (len(value) if isinstance(value, list | dict) else 0)
            if seen > MAX_ENTRIES:
                raise refusal(f"it has more than {MAX_ENTRIES:,} entries")
            _refuse_fetching(key, value, refusal)
            _refuse_number(key, value, refusal)
        parameters += _parameters(mapping, refusal)
    if parameters > MAX_PARAMETERS:
        raise refusal(
            f"it describes about {parameters:.0e} parameters, and no model has more than {MAX_PARAMETERS:.0e}"
        )


class _Refusal:
    """Makes the errors about one component."""

    def __init__(self, model: str, component: str) -> None:
        self.model, self.component = model, component

    def __call__(self, why: str, do: str = "") -> ModelError:
        return ModelError(
            f"{self.model}: the configuration of its component {self.component!r} cannot be a model's",
            why,
            do or "the file is damaged or hostile: download the model again, from whom you trust",
        )


def _mappings(config: Mapping[str, Any]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yield every mapping with its depth, without recursion. It stops being deep where `check` stops asking."""
    waiting: list[tuple[int, Any]] = [(0, config)]
    while waiting:
        depth, value = waiting.pop()
        if isinstance(value, Mapping):
            yield depth, value
            waiting.extend((depth + 1, v) for v in value.values())
        elif isinstance(value, list):
            if depth > MAX_DEPTH:
                yield depth, {}
            waiting.extend((depth + 1, v) for v in value if isinstance(v, list | dict))


def _refuse_fetching(key: str, value: Any, refusal: _Refusal) -> None:
    """Refuse what makes the libraries download something while a model is built: kernels (code), or a backbone."""
    if key in _FETCHED_WEIGHTS and value:
        raise refusal(f"{key} makes transformers download another model", "use a model that is whole in itself")
    if _FETCHED_CODE.match(key):
        named = value.values() if isinstance(value, Mapping) else (value,)
        if any(isinstance(n, str) and not n.replace("-", "_").isidentifier() for n in named):
            raise refusal(f"{key} is {_shown(value)}, code that would be downloaded and run", f"take {key} out of it")


def _refuse_number(key: str, value: Any, refusal: _Refusal) -> None:
    numbers = list(_numbers(value))
    if any(isinstance(n, float) and math.isnan(n) for n in numbers):
        raise refusal(f"{key} is not a number (NaN)")
    if _FREE.match(key):
        return
    is_scalar = not isinstance(value, list)
    is_count = _COUNT.match(key) is not None
    most = MAX_LAYERS if is_count else MAX_SIDE if _SIDE.match(key) else MAX_WIDTH if _WIDTH.match(key) else MAX_NUMBER
    for number in numbers:
        # A scheduler's bounds may be infinite floats; no size may.
        if abs(number) > most and (most < MAX_NUMBER or isinstance(number, int)):
            raise refusal(f"{key} is {_shown(number)}, and no model has more than {most:,}")
    if is_scalar and numbers and _NEVER_BELOW_ONE.match(key) and numbers[0] < 1 and not _is_without(key, numbers[0]):
        raise refusal(f"{key} is {_shown(numbers[0])}, and a model has one at least")
    if is_scalar and numbers and is_count and numbers[0] < 0:
        raise refusal(f"{key} is {_shown(numbers[0])}, which is less than none")


def _is_without(key: str, number: float) -> bool:
    """Return whether a model may do without: FLUX-like ones may have single layers only, `num_layers` being 0."""
    return key == "num_layers" and number == 0


def _numbers(value: Any) -> Iterator[int | float]:
    """Yield the numbers of a value: its own, or those of a list and of the lists in it."""
    for item in value if isinstance(value, list) else (value,):
        if isinstance(item, list):
            yield from (i for i in item if isinstance(i, int | float) and not isinstance(i, bool))
        elif isinstance(item, int | float) and not isinstance(item, bool):
            yield item


def _parameters(config: Mapping[str, Any], refusal: _Refusal) -> float:
    """Return about how many parameters one mapping describes, by the usual shape of its kind.

    Raises: ModelError, when there are more blocks than can be built, or none.
    """
    # A list under a count is a count for every stage, or names layers by number: what matters is how many there are.
    counts = {k: _total(v) for k, v in config.items() if _COUNT.match(k) and not _PER_BLOCK.match(k)}
    if isinstance(config.get("num_layers"), int) and not any(counts.values()):
        raise refusal("num_layers is 0, and a model has one at least")
    stages = max((len(v) for k, v in config.items() if _STAGES.match(k) and isinstance(v, list)), default=0)
    each = _each(config, transformers=False) * _each(config, transformers=True)
    blocks = sum(counts.values()) + stages * each
    experts = max((_largest(v) for k, v in config.items() if _EXPERTS.match(k)), default=0)
    if blocks > MAX_BLOCKS:
        raise refusal(f"it describes about {blocks:,.0f} blocks, and no model has more than {MAX_BLOCKS:,}")
    if blocks * max(1, experts) > MAX_EXPERT_BLOCKS:
        raise refusal(f"it describes about {blocks * experts:,.0f} experts in {blocks:,.0f} blocks")
    heads = _largest(config.get("num_attention_heads"))
    inner = max([heads * _largest(config.get("attention_head_dim", config.get("head_dim"))), *_inner(config)])
    feed = max((_largest(v) for k, v in config.items() if k in ("intermediate_size", "d_ff", "ffn_dim")), default=0)
    vocabulary = _largest(config.get("vocab_size"))
    return max(1, blocks) * inner * (4 * inner + 3 * (feed or 4 * inner) * max(1, experts)) + vocabulary * inner


def _each(config: Mapping[str, Any], *, transformers: bool) -> float:
    """Return how many layers a stage has, or how many transformer layers each of those; on the way down, up or both."""
    found = (_largest(v) for k, v in config.items() if _PER_BLOCK.match(k) and ("transformer" in k) == transformers)
    return max(1, *found, 1)


def _inner(config: Mapping[str, Any]) -> list[float]:
    return [_largest(v) for k, v in config.items() if _INNER.match(k) or k.endswith("out_channels")]


def _largest(value: Any) -> float:
    return max(_numbers(value), default=0)


def _total(value: Any) -> float:
    if isinstance(value, list):
        return len(value)
    return sum(_numbers(value))


def _shown(value: Any) -> str:
    text = f"{value:,}" if isinstance(value, int) and abs(value) < 10**15 else str(value)
    return text if len(text) <= 60 else f"{text[:57]}…"

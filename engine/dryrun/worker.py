"""Dry runs in a process of their own: `python -m engine.dryrun.worker`, spoken to by `engine.estimate.dryrunner`.

A question is one line of JSON on standard input: what is known of a model, what is asked of it, the dtype, and the
optimizers that change what is computed. An answer is one line of JSON on standard output, {"bytes": N} and then the N
bytes of a trace, or {"error": …}. The process sees no card, so that no CUDA context can come of it, and it ends when
its input does.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from typing import Any, BinaryIO

from engine import collector, optimizers
from engine.errors import DgRunError
from engine.estimate import tracefile
from engine.facts.model import Component, Defaults, Model
from engine.values import FrozenDict, Request


def main() -> None:
    """Answer until the input ends."""
    # What the libraries print is no part of an answer.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    for line in sys.stdin:
        _answer(json.loads(line), answers)


def _answer(question: Mapping[str, Any], answers: BinaryIO) -> None:
    with collector.off():
        from engine.dryrun import run

    content = b""
    try:
        trace = run.trace(
            model_of(question["model"]),
            request_of(question["request"]),
            question["dtype"],
            tuple(optimizers.spec(name).step(params) for name, params in question["changes"]),
            is_plain=question["is_plain"],
        )
        content = tracefile.dump(trace)
        head: dict[str, Any] = {"bytes": len(content)}
    except DgRunError as error:
        told = {"what": error.what, "why": error.why, "do": error.do}
        head = {"error": told | {"kind": type(error).__name__}}
    answers.write(json.dumps(head).encode() + b"\n" + content)
    answers.flush()


def model_of(content: Mapping[str, Any]) -> Model:
    """Return a model from its JSON form."""
    components = {name: _component(part) for name, part in content["components"].items()}
    usual: dict[str, Any] = {**content["defaults"], "call": FrozenDict(content["defaults"]["call"])}
    return Model(
        id=content["id"],
        source=content["source"],
        pipeline_class=content["pipeline_class"],
        components=FrozenDict(components),
        revision=content["revision"],
        defaults=Defaults(**usual),
    )


def _component(content: Mapping[str, Any]) -> Component:
    given: dict[str, Any] = {k: FrozenDict(v) if isinstance(v, dict) else _plain(v) for k, v in content.items()}
    return Component(**given)


def request_of(content: Mapping[str, Any]) -> Request:
    """Return what a dry run needs of a request from its JSON form."""
    return Request(**{**content, "call": FrozenDict(content["call"])})


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


if __name__ == "__main__":
    main()

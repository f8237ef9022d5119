"""Values and shapes on meta: what is known without computing, and what is refused to be known."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from engine.dryrun import shapes, twins
from engine.dryrun.follow import Follower
from engine.estimate.trace import Trace
from tests.architectures import architectures
from tests.test_dryrun import dry, events
from truth import pipelines

LARGE = (1000, 1000)


def told(trace: Trace) -> Any:
    return list(trace.told()), trace.works


@pytest.mark.parametrize("name", architectures("flux", "pixart", "ltx"))
def test_a_call_answered_from_the_first_of_its_kind_leaves_the_same_trace(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = told(dry(*pipelines.made(name)))
    again = told(dry(*pipelines.made(name)))
    monkeypatch.setattr(shapes.Operator, "result", lambda self, args, kwargs: self.func(*args, **kwargs))
    computed = told(dry(*pipelines.made(name)))
    assert quick == computed
    assert again == computed


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def twice(function: Any, *inputs: Tensor) -> tuple[Any, Any]:
    """Return what a function gives the first time and the next."""
    with torch.no_grad(), Follower("meta"):
        return function(*inputs), function(*inputs)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x + 1,
        lambda x: x.transpose(0, 1) * 2,
        lambda x: x.int() * 1.0,
        lambda x: x.int() * 1,
        lambda x: torch.nn.functional.layer_norm(x, (40,)),
        lambda x: x[:, :3].contiguous(),
        lambda x: torch.empty_like(x.t()),
        lambda x: torch.cat([x, x]),
        lambda x: x.new_zeros(5, 7).half(),
    ],
)
def test_the_next_result_is_like_the_first_and_like_a_real_one(function: Any) -> None:
    first, second = twice(function, meta(30, 40))
    real = function(torch.empty(30, 40))
    for made in (first, second):
        assert (made.shape, made.stride(), made.dtype) == (real.shape, real.stride(), real.dtype)
        assert made.untyped_storage().nbytes() == real.untyped_storage().nbytes()
    assert first.untyped_storage()._cdata != second.untyped_storage()._cdata


def test_views_share_and_what_is_written_in_place_stays_where_it_is() -> None:
    with torch.no_grad(), Follower("meta"):
        x = meta(20, 30)
        for _ in range(2):
            assert x.view(600).untyped_storage()._cdata == x.untyped_storage()._cdata
            assert torch.ops.aten._unsafe_view(x, [600]).untyped_storage()._cdata == x.untyped_storage()._cdata
            assert x.add_(1) is x
        y = meta(4)
        y.resize_(8)
        assert y.shape == (8,)
        z = meta(4)
        z.resize_(8)
        assert z.shape == (8,)
        one, other, target = meta(4), meta(4), meta(4)
        target.set_(one).set_(one).set_(other)  # type: ignore[call-overload]
        assert target.untyped_storage()._cdata == other.untyped_storage()._cdata


def test_results_of_many_kinds_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "_MOST_KINDS", 10)
    monkeypatch.setattr(shapes, "_kinds", {})
    with torch.no_grad(), Follower("meta"):
        for k in range(1, 40):
            assert (meta(k) + 1).shape == (k,)
    assert len(shapes._kinds) <= 10


def test_a_large_tensor_of_one_value_has_that_value() -> None:
    with torch.no_grad(), Follower("meta"):
        zeros = torch.zeros(LARGE, device="meta")
        assert bool(torch.all(zeros == 0))
        assert not bool((zeros.to(torch.bfloat16).view(-1) * 3 + 1 == 0).any())
        assert torch.full(LARGE, 2.5, device="meta")[7, 8].item() == 2.5
        assert torch.ones_like(zeros).t()[5:].sum().item() == 995_000


def test_a_large_tensor_of_one_value_has_none_once_it_is_written_to() -> None:
    with torch.no_grad(), Follower("meta"):
        zeros = torch.zeros(LARGE, device="meta")
        part = zeros[0]
        part[3] = 1.0
        for written in (zeros, part, zeros.view(-1)):
            with pytest.raises(twins.ValueNeeded):
                written.sum().item()
        mixed = torch.zeros(LARGE, device="meta") + torch.rand(LARGE, device="meta")
        with pytest.raises(twins.ValueNeeded):
            mixed.max().item()


def test_what_left_the_device_without_a_value_stays_without_and_takes_no_memory() -> None:
    with torch.no_grad(), Follower("meta") as follower:
        picture = torch.rand(3, 4096, 4096, dtype=torch.bfloat16, device="meta")
        copy = (picture.cpu().permute(1, 2, 0).float() * 255).round().to(torch.uint8)
        assert copy.device.type == "cpu"
        assert (copy.shape, copy.dtype) == ((4096, 4096, 3), torch.uint8)
        assert copy.untyped_storage().nbytes() == 1
        assert copy.numpy().shape == (4096, 4096, 3)
        with pytest.raises(twins.ValueNeeded):
            copy[0, 0, 0].item()
        back = copy.to("meta")
        assert twins.twin(back) is None
        host = torch.zeros(3, 5)
        host[1] = torch.rand(LARGE, device="meta")[0, :5].cpu()
        with pytest.raises(twins.ValueNeeded):
            host.sum().item()
    assert [e.size_bytes for e in events(follower) if e.sign == "+" and e.size_bytes > 5000] == [
        2 * 3 * 4096**2,
        3 * 4096**2,
        4_000_000,
    ]


def test_routing_by_scores_that_nobody_knows_is_assumed_even() -> None:
    with torch.no_grad(), twins.assumed() as assumed, Follower("meta"):
        scores = torch.rand(3000, 8, device="meta").softmax(dim=-1)
        chosen = torch.topk(scores, k=2, dim=-1, sorted=False)[1]
        assert chosen.view(-1).bincount().tolist() == [750] * 8
        with pytest.raises(twins.ValueNeeded):
            torch.topk(scores, k=2, dim=0)[1].view(-1).bincount()
    assert assumed == {"2 of 8 chosen by topk: every one as often as any other"}
    with torch.no_grad(), twins.assumed() as assumed, Follower("meta"):
        known = torch.tensor([[1.0, 3.0, 2.0]], device="cpu").to("meta")
        assert torch.topk(known, 1)[1].item() == 1
    assert not assumed

"""Choose: values in, a decision out.

Candidates (`candidates.py`: profiles x alternatives x values of `auto`) are held against their profile's `match`, the
request and the rules (`judge.py`). What is left is searched by least cost (`search.py`): bounds first, replays only
where they can decide. Why everything else was not taken is told by `reasons.py`. Nothing here imports torch.
"""

from engine.solve.exact import exact
from engine.solve.search import better, choose, named
from engine.solve.situation import Decision, Situation

__all__ = ["Decision", "Situation", "better", "choose", "exact", "named"]

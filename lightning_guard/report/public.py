"""What of a report may leave the house."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

PUBLIC = "public"
_WARNING = (
    "Do not publish the models of two arms together: whoever sees a guarded model beside its unguarded one can tell "
    "more surely who was in the training data than from either alone (FD-MIA, arXiv:2311.03865; CompLeak, "
    "arXiv:2507.16872). Several models of one private arm add up: the epsilon of all of them is the sum of theirs, not "
    "that of one; an unguarded model has none."
)
_LEFT_OUT = (
    "This rendering holds no pictures of data, no outputs of single examples, no command and no source revision. "
    "Figures of small groups are in it: look at them before publishing, a group of a few people is hardly anonymous."
)


def publishable(report: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the report without what shows examples or the place where it was made, and with what that means.

    | part of the report                       | in the publishable one                          |
    |------------------------------------------|-------------------------------------------------|
    | figures, intervals, claims, gates        | as they are                                     |
    | pictures                                 | left out: they are made of test or training data |
    | the command, the source revision         | left out: they may hold names and paths         |
    | limits                                   | what publishing would leak, and what is left out |

    Weights, predictions, attacked inputs and the scores of reference models are no part of any report; they stay in
    ``runs/``.
    """
    found = copy.deepcopy(dict(report))
    for run in found["runs"]:
        run["pictures"] = {}
    found["provenance"] |= {"command": None, "git": None}
    found["limits"] = [_WARNING, *_together(report), _LEFT_OUT, *found["limits"]]
    return found


def _together(report: Mapping[str, Any]) -> Iterator[str]:
    """Yields for every private arm what publishing all of its models would cost."""
    for arm in report["arms"]:
        spent = [run["values"].get("privacy/epsilon") for run in report["runs"] if run["arm"] == arm["name"]]
        known = [epsilon for epsilon in spent if epsilon is not None]
        if len(known) > 1:
            yield (
                f"The {len(known)} models of {arm['name']} together have an epsilon of at most {sum(known):.3g} (basic "
                "composition; their deltas add up too)."
            )

"""What is done next is always the gentlest thing left, to what is longest unused."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from edge_agent.memory.relief import Item, Step, next_step

CHAIN = {"float32": "klt2", "klt2": "klt4"}
items = st.lists(
    st.builds(Item, st.text("abc", min_size=1, max_size=3), st.sampled_from(["float32", "klt2", "klt4", "q8"]),
              st.booleans()),
    max_size=6,
)  # fmt: skip


@given(items, st.booleans())
def test_nothing_leaves_while_anything_can_be_tightened(found: list[Item], disk: bool) -> None:
    step = next_step(found, CHAIN.get, disk=disk)
    loose = [item for item in found if item.rung in CHAIN]
    if loose:
        assert step == Step(loose[0].context_id, CHAIN[loose[0].rung])
    elif found:
        assert step == Step(found[0].context_id, to_disk=disk and not found[0].kept)
    else:
        assert step is None


@given(items, st.booleans())
def test_it_comes_to_an_end(found: list[Item], disk: bool) -> None:
    left = list(found)
    for _ in range(3 * len(found) + 1):
        step = next_step(left, CHAIN.get, disk=disk)
        if step is None:
            break
        at = next(i for i, item in enumerate(left) if item.context_id == step.context_id
                  and (step.rung is None or item.rung in CHAIN))  # fmt: skip
        left[at : at + 1] = [Item(step.context_id, step.rung)] if step.rung else []
    assert not left

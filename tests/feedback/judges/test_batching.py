"""Any number of rows through a function of one shape."""

import jax
import numpy as np
import pytest

from rlaif_jax.feedback.judges.batching import in_batches


@pytest.mark.parametrize("count", [0, 1, 4, 5, 8, 30])
def test_every_row_has_its_result_and_the_shape_is_one(count):
    shapes = []

    def fn(batch):
        shapes.append(batch["x"].shape)
        return {"sum": batch["x"].sum(-1), "first": batch["y"][:, :1]}

    rows = {"x": np.arange(3 * count, dtype=np.float32).reshape(count, 3), "y": np.ones((count, 2), bool)}
    counted = []
    found = in_batches(jax.jit(fn), rows, 4, progress=lambda *of: counted.append(of))
    np.testing.assert_array_equal(found["sum"], rows["x"].sum(-1))
    assert found["first"].shape == (count, 1)
    assert found["first"].dtype == bool
    assert isinstance(found["sum"], np.ndarray)
    assert shapes == [(4, 3)]
    assert counted == [(min(done, count), count) for done in range(4, max(count, 1) + 4, 4)]


def test_the_last_batch_is_filled_with_copies_of_the_first_row():
    seen = []
    in_batches(lambda x: seen.append(x.tolist()) or x, np.array([7, 8, 9]), 2)
    assert seen == [[7, 8], [9, 7]]


def test_few_batches_are_dispatched_ahead_of_the_one_that_is_waited_for():
    events = []
    in_batches(lambda x: events.append("dispatch") or x, np.arange(20), 1, progress=lambda *_: events.append("done"))
    assert events.count("dispatch") == events.count("done") == 20
    ahead = np.cumsum([1 if event == "dispatch" else -1 for event in events])
    assert 2 <= ahead.max() <= 5
    assert all(ahead[:-1] >= 1)

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from rlaif_jax.config import UserError
from rlaif_jax.data.prompts import bucket_length, padded, prompt_batches
from rlaif_jax.data.readers import jsonl_records
from rlaif_jax.data.tokenizers import word_level_tokenizer

WORDS = word_level_tokenizer(tuple(f"w{i}" for i in range(30)))


def prompts(n: int) -> list[dict[str, object]]:
    """Prompt i has i % 5 + 1 words and begins with word i."""
    return [{"prompt": " ".join(f"w{j % 30}" for j in range(i, i + i % 5 + 1))} for i in range(n)]


def write(path: Path, *lines: object) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


# ------------------------------------------------------------------------------------------- arrays


def test_padded_by_hand():
    tokens, mask = padded([[5, 6], [], [7, 8, 9]], 3, 0, "left")
    np.testing.assert_array_equal(tokens, [[0, 5, 6], [0, 0, 0], [7, 8, 9]])
    np.testing.assert_array_equal(mask, [[False, True, True], [False] * 3, [True] * 3])
    assert tokens.dtype == np.int32
    assert mask.dtype == np.bool_
    # A token that equals pad_id is real all the same.
    tokens, mask = padded([[0, 6], []], 3, 0, "right")
    np.testing.assert_array_equal(tokens, [[0, 6, 0], [0, 0, 0]])
    np.testing.assert_array_equal(mask, [[True, True, False], [False] * 3])
    assert padded([], 4, 0, "left")[0].shape == (0, 4)
    with pytest.raises((UserError, ValueError), match="sequence 1 has 4 tokens"):
        padded([[1], [1, 2, 3, 4]], 3, 0, "left")


def test_bucket_length():
    assert [bucket_length(n) for n in (0, 1, 16, 17, 32, 33, 1000)] == [16, 16, 16, 32, 32, 64, 1024]
    assert [bucket_length(n, smallest=1) for n in (0, 1, 2, 3, 4, 5)] == [1, 1, 2, 4, 4, 8]
    assert [bucket_length(n, (48, 8)) for n in (1, 8, 9, 48)] == [8, 8, 48, 48]
    with pytest.raises(UserError, match=r"49 tokens fit in none of the length buckets \[8, 48\]"):
        bucket_length(49, (48, 8))


# ------------------------------------------------------------------------------------------- batches


def test_batches_hold_the_prompts_left_padded():
    records = prompts(6)
    batch = next(prompt_batches(records, WORDS, batch_size=3, seed=0, prompt_length=6, shuffle=False, add_bos=True))
    np.testing.assert_array_equal(batch.tokens, [[0, 0, 0, 0, 1, 4], [0, 0, 0, 1, 5, 6], [0, 0, 1, 6, 7, 8]])
    np.testing.assert_array_equal(batch.mask, batch.tokens != 0)
    np.testing.assert_array_equal(batch.uid, [0, 1, 2])
    assert batch.uid.dtype == np.uint32
    assert batch.records == tuple(records[:3])


def test_texts_may_be_bytes():
    records = [{"prompt": b"w1 w2", "scene": "é".encode(), "uid": np.int64(5)}]
    batch = next(prompt_batches(records, WORDS, batch_size=1, seed=0, prompt_length=2))
    np.testing.assert_array_equal(batch.tokens, [[5, 6]])
    assert batch.uid == [5]
    assert batch.records == ({"prompt": "w1 w2", "scene": "é", "uid": 5},)


def test_every_epoch_is_a_new_order_of_all():
    records = prompts(20)
    iterator = prompt_batches(records, WORDS, batch_size=5, seed=1, prompt_length=5)
    epochs = [[int(u) for _ in range(4) for u in next(iterator).uid] for _ in range(3)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in [*epochs, list(range(20))]}) == 4
    same = prompt_batches(records, WORDS, batch_size=5, seed=1, prompt_length=5)
    other = prompt_batches(records, WORDS, batch_size=5, seed=2, prompt_length=5)
    assert [int(u) for _ in range(4) for u in next(same).uid] == epochs[0]
    assert [int(u) for _ in range(4) for u in next(other).uid] != epochs[0]


def test_remainder_is_dropped_or_kept_and_no_prompt_is_twice_in_a_batch():
    iterator = prompt_batches(prompts(10), WORDS, batch_size=4, seed=0, prompt_length=5)
    seen = Counter(int(u) for _ in range(2 * 20) for u in next(iterator).uid)
    assert sorted(seen) == list(range(10))  # the two left out are others each epoch
    iterator = prompt_batches(prompts(10), WORDS, batch_size=4, seed=0, prompt_length=5)
    assert all(len(set(next(iterator).uid.tolist())) == 4 for _ in range(12))
    kept = list(
        prompt_batches(prompts(10), WORDS, batch_size=4, seed=0, prompt_length=5, epochs=2, drop_remainder=False)
    )
    assert [len(b.uid) for b in kept] == [4, 4, 2, 4, 4, 2]
    assert sorted(int(u) for b in kept[:3] for u in b.uid) == list(range(10))
    endless = prompt_batches(prompts(10), WORDS, batch_size=4, seed=0, prompt_length=5)
    counted = prompt_batches(prompts(10), WORDS, batch_size=4, seed=0, prompt_length=5, epochs=2)
    assert (endless.batches, counted.batches) == (None, 4)
    dropped = list(counted)
    assert len(dropped) == 4
    assert [len(b.uid) for b in dropped] == [4] * 4
    small = prompt_batches(prompts(3), WORDS, batch_size=8, seed=0, prompt_length=5, epochs=1, drop_remainder=False)
    assert [len(b.uid) for b in small] == [3]


def test_buckets_shorten_a_batch():
    iterator = prompt_batches(
        prompts(10), WORDS, batch_size=1, seed=0, prompt_length=5, shuffle=False, epochs=1, buckets=(2, 4, 8)
    )
    assert [b.tokens.shape for b in iterator] == [(1, 2), (1, 2), (1, 4), (1, 4), (1, 5)] * 2


def test_uid_of_the_record():
    records = [{**record, "uid": 2**32 - 1 - i} for i, record in enumerate(prompts(3))]
    iterator = prompt_batches(records, WORDS, batch_size=3, seed=0, prompt_length=5, shuffle=False)
    np.testing.assert_array_equal(next(iterator).uid, [2**32 - 1, 2**32 - 2, 2**32 - 3])
    named = [{**record, "uid": f"scene-{i}"} for i, record in enumerate(prompts(3))]
    iterator = prompt_batches(named, WORDS, batch_size=3, seed=0, prompt_length=5, shuffle=False)
    np.testing.assert_array_equal(next(iterator).uid, [0, 1, 2])


def test_state_resumes_exactly():
    def make():
        return prompt_batches(prompts(10), WORDS, batch_size=4, seed=7, prompt_length=5)

    for done in (0, 1, 2, 5):
        iterator = make()
        for _ in range(done):
            next(iterator)
        state = json.loads(json.dumps(iterator.get_state()))
        rest = [next(iterator).uid.tolist() for _ in range(7)]
        resumed = make()
        next(resumed)  # where it stood before does not matter
        resumed.set_state(state)
        assert resumed.get_state() == state
        assert [next(resumed).uid.tolist() for _ in range(7)] == rest


def test_state_resumes_in_another_process(tmp_path: Path):
    path = write(tmp_path / "p.jsonl", *prompts(10))
    program = """
import json, sys
from rlaif_jax.data.prompts import prompt_batches
from rlaif_jax.data.readers import jsonl_records
from rlaif_jax.data.tokenizers import load_tokenizer
folder, state = sys.argv[1], json.loads(sys.argv[2])
iterator = prompt_batches(jsonl_records(folder + "/p.jsonl"), load_tokenizer(folder), batch_size=4, seed=7,
                          prompt_length=5)
iterator.set_state(state)
print(json.dumps([next(iterator).tokens.tolist() for _ in range(5)]))
"""
    WORDS.save(tmp_path)
    iterator = prompt_batches(jsonl_records(path), WORDS, batch_size=4, seed=7, prompt_length=5)
    for _ in range(3):
        next(iterator)
    state = json.dumps(iterator.get_state())
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path), state],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).resolve().parents[2],
    )
    assert json.loads(done.stdout) == [next(iterator).tokens.tolist() for _ in range(5)]


def test_state_of_other_data_is_refused():
    def make(records=None, **changed):
        arguments = {"batch_size": 4, "seed": 7, "prompt_length": 5} | changed
        return prompt_batches(records or prompts(10), WORDS, **arguments)

    state = make().get_state()
    make(epochs=3).set_state(state)  # a longer or shorter run is the same sequence
    for other, name in (
        (make(prompts(11)), "prompts"),
        (make(batch_size=5), "batch_size"),
        (make(seed=8), "seed"),
        (make(shuffle=False), "shuffle"),
        (make([*prompts(9), {"prompt": "w1"}]), "fingerprint"),
    ):
        with pytest.raises(UserError, match=f"of other prompts: {name} was"):
            other.set_state(state)
    with pytest.raises(UserError, match="of other prompts"):
        make().set_state({})


def test_long_prompts(tmp_path: Path):
    path = write(tmp_path / "p.jsonl", {"prompt": "w1"}, {"prompt": "w1 w2 w3 w4", "uid": 77})
    records = jsonl_records(path)
    with pytest.raises(UserError, match=r"p\.jsonl:2 \(uid 77\): the prompt has 5 tokens.*prompt_length = 4"):
        prompt_batches(records, WORDS, batch_size=1, seed=0, prompt_length=4, add_bos=True)
    cut = prompt_batches(
        records, WORDS, batch_size=2, seed=0, prompt_length=3, add_bos=True, truncate="left", shuffle=False
    )
    np.testing.assert_array_equal(next(cut).tokens, [[0, 1, 5], [1, 7, 8]])
    cut = prompt_batches(records, WORDS, batch_size=2, seed=0, prompt_length=3, truncate="left", shuffle=False)
    np.testing.assert_array_equal(next(cut).tokens, [[0, 0, 5], [6, 7, 8]])
    exact = prompt_batches(records, WORDS, batch_size=2, seed=0, prompt_length=4)
    assert next(exact).mask.sum() == 5


@pytest.mark.parametrize(
    ("records", "changed", "said"),
    [
        ([], {}, "no prompts"),
        (prompts(3), {"batch_size": 4}, "batch_size is 4, but there are only 3 prompts"),
        (prompts(3), {"batch_size": 0}, "batch_size should be at least 1"),
        (prompts(3), {"epochs": 0}, "epochs should be at least 1"),
        ([{"prompt": ""}], {}, "record 0: the prompt has no tokens"),
        ([{"prompt": "w1"}, {"prompt": "w1 \ud83d"}], {}, 'record 1: field "prompt" holds half of a Unicode surrogate'),
        ([{"question": "w1"}], {}, 'record 0: field "prompt" should be a string.*"question"'),
        ([{"prompt": "w1", "uid": -1}], {}, "uid.*should be from 0"),
        ([{"prompt": "w1", "uid": 2**32}], {}, "uid.*should be from 0"),
        ([{"prompt": "w1", "uid": 1}, {"prompt": "w2"}], {}, "record 1 and record 0 .*same uid, 1"),
    ],
)
def test_bad_prompts(records, changed, said: str):
    arguments = {"batch_size": 1, "seed": 0, "prompt_length": 5} | changed
    with pytest.raises(UserError, match=said):
        prompt_batches(records, WORDS, **arguments)

"""Any number of replicas shares any batch: every sample once, equally many places, and steps in any order."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from framework.data.batching import IGNORED, Loader, places, share, tokens_labels, unequal
from framework.data.samples import build
from framework.data.windows import Data

SEQ_LEN = 6


@pytest.fixture
def data() -> Data:
    return build({"kind": "synthetic", "seq_len": SEQ_LEN, "num_samples": 100, "noise": 1.0}, seed=0)


def loader(data: Data, *, global_batch: int = 10, dp: int = 1, dp_index: int = 0, m: int = 1, held: int = 0) -> Loader:
    return Loader(
        data,
        seq_len=SEQ_LEN,
        global_batch=global_batch,
        dp=dp,
        dp_index=dp_index,
        num_microbatches=m,
        eval_samples=held,
    )


@given(st.integers(0, 10**12), st.integers(1, 200), st.integers(1, 70), st.integers(1, 16))
def test_every_sample_is_taken_once_and_all_replicas_have_equally_many_places(
    first: int, batch: int, dp: int, m: int
) -> None:
    shares = [share(first_sample=first, global_batch=batch, dp=dp, dp_index=i, num_microbatches=m) for i in range(dp)]
    taken = [index for part in shares for index in part if index is not None]
    assert taken == list(range(first, first + batch)), "in order, so that a layout changes who, never what"
    assert {len(part) for part in shares} == {places(global_batch=batch, dp=dp, num_microbatches=m)}
    assert len(shares[0]) % m == 0 and len(shares[0]) < batch / dp + m + 1
    counts = [sum(index is not None for index in part) for part in shares]
    assert max(counts) - min(counts) <= 1


def test_the_drawing() -> None:
    shares = [share(first_sample=0, global_batch=10, dp=3, dp_index=i, num_microbatches=2) for i in range(3)]
    assert shares == [[0, 1, 2, None], [3, 4, 5, None], [6, 7, 8, 9]]


@given(st.integers(0, 10**12), st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(1, 8))
def test_unequal_shares_take_every_sample_once_and_fill_no_more_than_their_last_row(first: int, shares: list[int], m: int) -> None:
    parts = [unequal(first_sample=first, shares=shares, dp_index=i, num_microbatches=m) for i in range(len(shares))]
    assert [i for part in parts for i in part if i is not None] == list(range(first, first + sum(shares)))
    assert all(len(part) % m == 0 and len(part) - taken < m for part, taken in zip(parts, shares, strict=True))


def test_shares_change_from_the_next_batch_on_and_back_though_it_was_made_already(data: Data) -> None:
    one, other = loader(data, dp=2), loader(data, dp=2, dp_index=1)
    with one, other, loader(data) as whole:
        for step, shares in ((1, ()), (2, (7, 3)), (3, (7, 3)), (4, ())):
            if step in (2, 4):
                one.share(shares)
                other.share(shares)
            parts = [feed.batch(step)[0] for feed in (one, other)]
            assert [len(part) for part in parts] == list(shares or (5, 5))
            assert torch.equal(torch.cat(parts), whole.batch(step)[0])


def test_labels_are_the_tokens_one_further_and_dummies_do_not_count(data: Data) -> None:
    tokens_BT, labels_BT = tokens_labels(data.train, [3, None], seq_len=SEQ_LEN)
    assert tokens_BT.dtype == labels_BT.dtype == torch.int64 and tokens_BT.shape == labels_BT.shape == (2, SEQ_LEN)
    assert tokens_BT[0].tolist() == data.train(3)[:-1].tolist() and labels_BT[0].tolist() == data.train(3)[1:].tolist()
    assert not tokens_BT[1].any() and (labels_BT[1] == IGNORED).all()


def test_the_global_batch_does_not_depend_on_the_layout(data: Data) -> None:
    def rows(step: int, dp: int, m: int) -> list[list[int]]:
        found = []
        for i in range(dp):
            with loader(data, dp=dp, dp_index=i, m=m) as one:
                tokens_BT, labels_BT = one.batch(step)
            pairs = zip(tokens_BT, labels_BT, strict=True)
            found += [tokens_T.tolist() for tokens_T, labels_T in pairs if labels_T[0] != IGNORED]
        return found

    for step in (1, 7):
        expected = [data.train(i)[:-1].tolist() for i in range(10 * (step - 1), 10 * step)]
        assert all(rows(step, dp, m) == expected for dp, m in ((1, 1), (2, 4), (3, 2), (4, 1), (16, 3)))


def test_steps_may_be_asked_in_any_order_and_again(data: Data) -> None:
    with loader(data) as one:
        expected = {
            step: tokens_labels(data.train, range(10 * step - 10, 10 * step), seq_len=SEQ_LEN) for step in range(1, 8)
        }
        for step in (1, 2, 3, 2, 3, 4, 1, 7, 7, 5, 6):
            tokens_BT, labels_BT = one.batch(step)
            assert tokens_BT.equal(expected[step][0]) and labels_BT.equal(expected[step][1])


class Slow:
    """Data that counts what is asked of it, and lets the test hold it back."""

    num_train, num_val = 100, 0

    def __init__(self, data: Data) -> None:
        self.data, self.asked, self.go = data, list[int](), threading.Event()

    def train(self, index: int):  # type: ignore[no-untyped-def]
        self.asked.append(index)
        assert self.go.wait(10)
        return self.data.train(index)


def test_the_next_batch_is_made_while_this_one_is_used_and_no_further(data: Data) -> None:
    slow = Slow(data)
    slow.go.set()
    with loader(slow, global_batch=2) as one:  # type: ignore[arg-type]
        one.batch(1)
        one.batch(2)
        one._thread.submit(lambda: None).result()
        assert slow.asked == [0, 1, 2, 3, 4, 5], "one batch ahead of step 2"
        slow.go.clear()
        one.batch(3)
        assert slow.asked[:6] == [0, 1, 2, 3, 4, 5], "step 3 was there already, and step 4 is not waited for"
        slow.go.set()


def test_an_error_in_the_thread_is_raised_by_the_step_that_needs_it(data: Data) -> None:
    class Broken(Slow):
        def train(self, index: int):  # type: ignore[no-untyped-def]
            if index >= 10:
                raise ValueError("data: broken")
            return self.data.train(index)

    with loader(Broken(data)) as one:  # type: ignore[arg-type]
        one.batch(1)
        with pytest.raises(ValueError, match="data: broken"):
            one.batch(2)


def test_closing_ends_the_thread(data: Data) -> None:
    before = threading.active_count()
    one = loader(data)
    one.batch(1)
    assert threading.active_count() == before + 1
    one.close()
    assert threading.active_count() == before


def held_out(data: Data, dp: int, **options: int) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
    for i in range(dp):
        with loader(data, dp=dp, dp_index=i, **options) as one:
            yield one.held_out()


@pytest.mark.parametrize(("dp", "m", "samples"), [(1, 1, 50), (2, 2, 50), (3, 4, 50), (4, 1, 7), (2, 1, 0)])
def test_held_out_samples_are_shared_in_batches_of_one_shape(dp: int, m: int, samples: int) -> None:
    data = build({"kind": "synthetic", "seq_len": SEQ_LEN, "num_samples": 100, "val_fraction": 0.3}, seed=0)
    shares = list(held_out(data, dp, m=m, held=samples))
    assert len({len(batches) for batches in shares}) == 1
    shape = (places(global_batch=10, dp=dp, num_microbatches=m), SEQ_LEN)
    assert all(tokens.shape == labels.shape == shape for batches in shares for tokens, labels in batches)
    counted = sum(int((labels != IGNORED).sum()) for batches in shares for _, labels in batches)
    with loader(data, dp=dp, m=m, held=samples) as one:
        assert counted == one.held_out_tokens == min(samples, data.num_val) * SEQ_LEN

"""The order of samples: complete, windowed, and cheap at the largest size that the design names."""

import pickle
import time
import tracemalloc

import numpy as np
import pytest

from distributed_inr.data.order import Order


def epoch(order: Order, number: int) -> list[tuple[int, int]]:
    size = len(order)
    return [order.locate(p)[1:] for p in range(number * size, (number + 1) * size)]


@pytest.mark.parametrize("samples", [[5], [5, 3, 1], [10] * 6, [1, 0, 4, 7], [2] * 13])
@pytest.mark.parametrize("num_streams", [1, 3, 4, 64])
@pytest.mark.parametrize("shuffle_shards", [1, 4])
def test_every_sample_comes_exactly_once_an_epoch(samples: list[int], num_streams: int, shuffle_shards: int) -> None:
    order = Order(samples, seed=1, shuffle_shards=shuffle_shards, num_streams=num_streams)
    everything = sorted((shard, i) for shard, count in enumerate(samples) for i in range(count))
    for number in (0, 7):
        assert sorted(epoch(order, number)) == everything
        assert {order.locate(number * len(order)).epoch} == {number}


def test_epochs_and_seeds_give_different_orders_and_equal_ones_the_same() -> None:
    first = Order([20] * 5, seed=1, shuffle_shards=2, num_streams=4)
    again = Order([20] * 5, seed=1, shuffle_shards=2, num_streams=4)
    other = Order([20] * 5, seed=2, shuffle_shards=2, num_streams=4)
    assert epoch(first, 0) == epoch(again, 0)
    assert epoch(first, 0) != epoch(first, 1)
    assert epoch(first, 0) != epoch(other, 0)


def test_order_is_the_recorded_one() -> None:
    """Runs resume on the same samples in every version: changing this order breaks them."""
    order = Order([3, 2, 4], seed=5, shuffle_shards=2, num_streams=2)
    assert epoch(order, 0) == [(0, 1), (2, 2), (0, 0), (2, 1), (0, 2), (1, 1), (2, 3), (1, 0), (2, 0)]


def test_position_is_the_item_of_a_span_and_longer_spans_come_first() -> None:
    """With one stream an epoch is the sequence itself; S streams interleave its S spans of 4, 4 and 3."""
    sequence = epoch(Order([4, 4, 3], seed=3, shuffle_shards=1, num_streams=1), 2)
    spans = [sequence[0:4], sequence[4:8], sequence[8:11]]
    expected = [spans[p % 3][p // 3] for p in range(11)]
    assert epoch(Order([4, 4, 3], seed=3, shuffle_shards=1, num_streams=3), 2) == expected


def test_samples_are_shuffled_only_within_windows_of_shards() -> None:
    sequence = epoch(Order([6] * 8, seed=0, shuffle_shards=2, num_streams=1), 0)
    windows = [{shard for shard, _ in sequence[i : i + 12]} for i in range(0, 48, 12)]
    assert [len(window) for window in windows] == [2, 2, 2, 2]
    assert len(set.union(*windows)) == 8
    inside = [shard for shard, _ in sequence[:12]]
    assert inside != sorted(inside) and inside != sorted(inside, reverse=True)


def test_permutations_are_uniform() -> None:
    """Over 800 epochs each sample of a window of four comes first about a quarter of the time (4 deviations)."""
    order = Order([4], seed=0, shuffle_shards=1, num_streams=1)
    counts = np.bincount([order.locate(4 * number).sample for number in range(800)], minlength=4)
    assert np.abs(counts - 200).max() < 4 * np.sqrt(800 * 0.25 * 0.75)


def test_windows_ahead_are_those_of_the_positions_to_come() -> None:
    order = Order([4] * 10, seed=0, shuffle_shards=2, num_streams=2)
    now, following = order.windows_ahead(0)
    stream = [order.locate(p).shard for p in range(0, 40, 2)]
    assert set(stream[:8]) == set(now)
    assert set(stream[8:16]) == set(following)
    assert order.windows_ahead(39)[1] == order.windows_ahead(40)[0]


@pytest.mark.alone
@pytest.mark.parametrize("position", [0, 10**9 - 1, 5 * 10**9 + 123_456_789, 10**15])
def test_first_position_of_a_billion_samples_is_known_within_a_second_and_200_mb(position: int) -> None:
    samples = [10**4] * 10**5
    tracemalloc.start()
    start = time.perf_counter()
    place = Order(samples, seed=0, shuffle_shards=16, num_streams=64).locate(position)
    seconds = time.perf_counter() - start
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert place.epoch == position // 10**9
    assert 0 <= place.shard < 10**5 and 0 <= place.sample < 10**4
    assert seconds < 1
    assert peak < 200e6


def test_a_pickled_order_is_small_and_the_same() -> None:
    order = Order([100] * 10, seed=0, shuffle_shards=4, num_streams=4)
    before = epoch(order, 0)
    copy = pickle.loads(pickle.dumps(order))
    assert epoch(copy, 0) == before
    assert len(pickle.dumps(order)) < 2000


def test_shards_without_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="no samples"):
        Order([0, 0], seed=0, shuffle_shards=1, num_streams=1)

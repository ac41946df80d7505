import numpy as np
import pytest

from data_pipeline.loading.order import MIXTURE_BLOCK, SHARDS_PER_BLOCK, MixtureOrder, RowOrder, quotas_of


def test_every_row_comes_once_an_epoch_and_each_epoch_differs():
    order = RowOrder(1000, "data", 0, [37] * 27 + [1])
    epochs = [order.rows(np.arange(1000 * epoch, 1000 * (epoch + 1))).tolist() for epoch in range(3)]
    assert all(sorted(epoch) == list(range(1000)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert order.row(3) == epochs[0][3]  # going back is no different


def test_the_order_is_a_function_of_fingerprint_and_seed():
    def rows(*identity):
        return RowOrder(100, *identity, [50, 50]).rows(np.arange(100)).tolist()

    assert rows("data", 0) == rows("data", 0)
    assert rows("data", 0) != rows("data", 1)
    assert rows("data", 0) != rows("other", 0)


def test_the_order_stays_what_it_was_in_earlier_versions():
    order = RowOrder(12, "data", 0, [4, 4, 4])
    assert order.rows(np.arange(12)).tolist() == [9, 7, 11, 1, 10, 6, 4, 0, 8, 3, 5, 2]
    # Later blocks and epochs, begun in the middle: 41 shards are three blocks, the last of nine.
    order = RowOrder(123, "data", 3, [3] * 41)
    assert order.rows(np.array([47, 48, 49, 95, 96, 97, 122])).tolist() == [93, 122, 106, 121, 56, 1, 2]
    assert order.rows(np.array([123, 200, 245, 246])).tolist() == [74, 27, 99, 92]


def test_a_row_is_the_same_however_it_is_asked_for():
    order = RowOrder(500, "data", 0, [7] * 71 + [3])
    whole = order.rows(np.arange(1500))
    picked = np.sort(np.random.default_rng(0).choice(1500, 200, replace=False))
    assert np.array_equal(RowOrder(500, "data", 0, [7] * 71 + [3]).rows(picked), whole[picked])
    assert all(order.row(int(position)) == whole[position] for position in picked[:20])


def test_reading_stays_within_a_block_of_shards():
    order = RowOrder(1000, "data", 0, [10] * 100)
    for start in range(0, 1000, 10 * SHARDS_PER_BLOCK):
        shards = set(order.rows(np.arange(start, min(start + 10 * SHARDS_PER_BLOCK, 1000))) // 10)
        assert len(shards) <= SHARDS_PER_BLOCK
    assert len(set(order.rows(np.arange(20)) // 10)) > 5


@pytest.mark.parametrize("position", [0, 155, 160, 990, 1999])
def test_the_shards_ahead_are_those_that_the_stream_reads_next(position):
    order = RowOrder(1000, "data", 0, [10] * 100)
    ahead = order.shards_ahead(position)
    assert len(ahead) <= 3 * SHARDS_PER_BLOCK
    # A whole block more than the one that the position is in, across the end of an epoch too.
    assert set(order.rows(np.arange(position, position + 41)) // 10) <= set(ahead)


def mixture(weights=(7, 2, 1), fingerprint="mixture", seed=0):
    orders = [RowOrder(rows, f"data{rows}", seed, [rows]) for rows in (3000, 50, 700)][: len(weights)]
    return MixtureOrder(orders, quotas_of(weights), fingerprint, seed)


def source_of(rows):
    return np.searchsorted([3000, 3050], rows, side="right")


def test_a_mixture_has_the_weights_shares_of_rows_also_over_short_stretches():
    rows = mixture().rows(np.arange(3 * MIXTURE_BLOCK))
    for block in range(3):
        counts = np.bincount(source_of(rows[block * MIXTURE_BLOCK : (block + 1) * MIXTURE_BLOCK]))
        assert counts.tolist() == [7000, 2000, 1000]
    shares = [np.mean(source_of(rows[start : start + 500]) == 0) for start in range(0, 10_000, 500)]
    assert min(shares) > 0.6 and max(shares) < 0.8


def test_each_source_of_a_mixture_comes_in_its_own_order_without_a_gap():
    order = mixture()
    rows = order.rows(np.arange(2 * MIXTURE_BLOCK + 77))
    first_row = 0
    for source, own in enumerate(order.orders):
        of_source = rows[source_of(rows) == source] - first_row
        assert np.array_equal(of_source, own.rows(np.arange(len(of_source))))
        first_row += own.num_rows


def test_a_mixture_is_a_function_of_fingerprint_seed_and_position():
    positions = np.arange(MIXTURE_BLOCK - 100, MIXTURE_BLOCK + 100)
    reference = mixture().rows(positions)
    assert np.array_equal(mixture().rows(positions[150:]), reference[150:])
    assert not np.array_equal(mixture(seed=1).rows(positions), reference)
    assert not np.array_equal(source_of(mixture(fingerprint="other").rows(positions)), source_of(reference))


def test_the_order_of_a_mixture_stays_what_it_was_in_earlier_versions():
    assert mixture().rows(np.array([0, 1, 2, 9_999, 10_000, 54_321])).tolist() == [3014, 122, 930, 1776, 1055, 81]


def test_weights_become_whole_rows_that_add_up():
    assert quotas_of([0.7, 0.3]) == [7000, 3000]
    assert quotas_of([0.57, 0.29, 0.14]) == [5700, 2900, 1400]
    assert quotas_of([1, 1, 1]) == [3334, 3333, 3333]
    assert quotas_of([2e9, 1]) == [10_000, 0]

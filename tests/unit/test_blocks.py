"""BlockPool keeps its counts whatever the order of calls."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eaglerun.errors import EngineError
from eaglerun.plan.blocks import BlockPool, hash_block, root_name


def test_a_name_covers_everything_before_it():
    root = root_name("")
    a = hash_block(root, [1, 2])
    assert a == hash_block(root, [1, 2])
    assert a != hash_block(root, [2, 1])
    assert hash_block(a, [3, 4]) != hash_block(hash_block(root, [9, 9]), [3, 4])
    assert root_name("tenant") != root


def test_published_blocks_are_found_and_reused_last():
    pool = BlockPool(3, 4)
    first, second = pool.allocate(2)
    pool.publish(first, b"a")
    pool.publish(second, b"b")
    assert pool.match([b"a", b"b", b"c"]) == [first, second]
    assert pool.match([b"x", b"a"]) == []
    pool.release([first, second])
    assert pool.num_free == 3 and pool.num_kept([first, second]) == 2
    pool.share(pool.match([b"a"]))
    assert pool.num_free == 2
    # The blank block goes first, then the kept one; the shared one never.
    assert pool.allocate(1) not in ([first], [second])
    assert pool.allocate(1) == [second]
    assert pool.match([b"a", b"b"]) == [first]
    pool.check_integrity([[first], [second], [2]])


def test_mistakes_are_errors():
    pool = BlockPool(2, 4)
    with pytest.raises(EngineError, match="3 KV blocks asked for, 2 free"):
        pool.allocate(3)
    taken = pool.allocate(1)
    pool.release(taken)
    with pytest.raises(EngineError, match="released twice"):
        pool.release(taken)
    leaked = pool.allocate(1)
    with pytest.raises(EngineError, match=f"KV block {leaked[0]}: count 1, held by 0"):
        pool.check_integrity([])


@settings(deadline=None, derandomize=True, database=None)
@given(st.lists(st.tuples(st.sampled_from("asrp"), st.integers(0, 5)), max_size=60))
def test_counts_equal_tables(calls: list[tuple[str, int]]):
    """Random tables that allocate, share, release and publish: counts always agree."""
    pool = BlockPool(8, 2)
    tables: list[list[int]] = []
    for call, n in calls:
        if call == "a" and n <= pool.num_free:
            tables.append(pool.allocate(n))
        elif call == "s" and tables:
            shared = list(tables[n % len(tables)])
            pool.share(shared)
            tables.append(shared)
        elif call == "r" and tables:
            pool.release(tables.pop(n % len(tables)))
        elif call == "p" and tables and tables[-1]:
            pool.publish(tables[-1][0], bytes([n]))
        pool.check_integrity(tables)
        assert pool.num_held == len({b for table in tables for b in table})

"""The KV cache of the modelled engine, compared with one that stores each block separately."""

from __future__ import annotations

from collections import OrderedDict

from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from rsm.simulation.prefix_paths import Paths
from rsm.simulation.workload.programs import Segment
from rsm.workers.backends.sim.cache import Hold, KVCache, path_of_ids, path_of_texts

SIZE = 4


class BlockByBlock:
    """A reference cache of single blocks. A block is identified by all tokens up to its end."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.private = 0
        self.users: dict[tuple[int, ...], int] = {}
        self.idle: OrderedDict[tuple[int, ...], None] = OrderedDict()

    def find(self, blocks: list[tuple[int, ...]]) -> tuple[int, int]:
        """How many leading blocks are cached, and in use."""
        known = [b in self.users or b in self.idle for b in blocks]
        used = [b in self.users for b in blocks]
        return [*known, False].index(False), [*used, False].index(False)

    def take(self, n: int) -> None:
        self.private += n
        while self.private + len(self.users) + len(self.idle) > self.size:
            self.idle.popitem(last=False)

    def hold(self, blocks: list[tuple[int, ...]], private: int) -> None:
        self.private -= private
        for b in blocks:
            self.idle.pop(b, None)
            self.users[b] = self.users.get(b, 0) + 1

    def release(self, blocks: list[tuple[int, ...]]) -> None:
        for b in reversed(blocks):
            self.users[b] -= 1
            if not self.users[b]:
                del self.users[b]
                self.idle[b] = None


def tokens_of(texts: list[tuple[int, int]]) -> list[int]:
    return [text * 1000 + i for text, n in texts for i in range(n)]


def blocks_of(tokens: list[int]) -> list[tuple[int, ...]]:
    return [tuple(tokens[: i + SIZE]) for i in range(0, len(tokens) - SIZE + 1, SIZE)]


TEXTS = st.lists(st.tuples(st.integers(1, 3), st.sampled_from([1, 2, 4, 5, 9, 16])), min_size=1, max_size=5)


@hypothesis_settings(max_examples=300, deadline=None)
@given(
    prompts=st.lists(st.tuples(TEXTS, st.booleans()), min_size=1, max_size=25),
    size=st.integers(8, 40),
    order=st.randoms(use_true_random=False),
    by_ids=st.booleans(),
)
def test_it_keeps_and_evicts_the_same_blocks_as_the_reference(
    prompts: list[tuple[list[tuple[int, int]], bool]], size: int, order: object, by_ids: bool
) -> None:
    cache, plain = KVCache(size), BlockByBlock(size)
    running: list[tuple[list[tuple[int, ...]], Hold | None]] = []
    for texts, ends_one in prompts:
        tokens = tokens_of(texts)
        path = path_of_ids(tokens, SIZE) if by_ids else path_of_texts(texts, SIZE)
        blocks = blocks_of(tokens)
        assert (path[-1][1] if path else 0) == len(blocks)
        for most in (len(blocks), len(blocks) // 2):
            assert cache.find(path, most) == plain.find(blocks[:most])
        cached, live = cache.find(path, len(blocks))
        if len(blocks) - live <= cache.free:
            first = cache.hold(path, cached, 0)
            plain.hold(blocks[:cached], 0)
            new = len(blocks) - cached
            cache.take(new)
            plain.take(new)
            running.append((blocks, cache.hold(path, len(blocks), new)))
            cache.release(first)
            plain.hold(blocks[cached:], new)
        elif not running:
            continue
        if running and (ends_one or cache.free < 3):
            blocks, held = running.pop(order.randrange(len(running)))  # type: ignore[attr-defined]
            cache.release(held)
            plain.release(blocks)
        assert (cache.private, cache.live, cache.idle) == (plain.private, len(plain.users), len(plain.idle))


def test_a_block_over_two_texts_is_identified_by_both() -> None:
    cache = KVCache(100)
    path = path_of_texts([(1, 6), (2, 6)], SIZE)
    cache.take(3)
    cache.release(cache.hold(path, 3, 3))
    assert cache.find(path_of_texts([(1, 6), (2, 6)], SIZE), 3).cached == 3
    assert cache.find(path_of_texts([(1, 6), (3, 6)], SIZE), 3).cached == 1
    assert cache.find(path_of_texts([(1, 5), (2, 7)], SIZE), 3).cached == 1
    assert cache.find(path_of_texts([(1, 6), (2, 3)], SIZE), 2).cached == 2


@given(st.lists(st.tuples(st.integers(0, 5), TEXTS), min_size=1, max_size=12))
def test_the_paths_of_a_program_are_those_of_its_whole_prompts(turns: list[tuple[int, list[tuple[int, int]]]]) -> None:
    paths = Paths(SIZE)
    contexts: list[tuple[Segment, ...]] = [()]
    for n, (earlier, new) in enumerate(turns):
        context = contexts[earlier % len(contexts)]
        prompt, answer = (*context, *(Segment(*text) for text in new)), Segment(100 + n, 7)
        path, tokens = paths.path(prompt, answer)
        assert list(path) == path_of_texts([*prompt, answer], SIZE)
        assert tokens == sum(s.tokens for s in prompt)
        contexts += [prompt, (*prompt, answer)]

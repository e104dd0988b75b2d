"""The KV cache of a modelled engine: blocks in use, and a tree of cached beginnings, evicted least recently used first.

What a call says is a `Path`: texts one behind the other, cut into blocks. A block is known by everything up to its last
token, so blocks are kept not one by one but as stretches of one text behind one history: a prompt of 150,000 tokens in
twenty texts costs twenty steps, not nine thousand. The order of eviction is that of single blocks, exactly: those given
back first go first, and of those given back together the end of a call goes before its beginning.

One thing differs from vLLM: a full block that two calls computed alike is kept once from the moment both are known;
vLLM keeps both copies while both calls run. It is at most one block a call, for at least one token of a prompt is
computed anew.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

# One stretch: what it is called behind the stretch before, and how many full blocks the path has up to its end.
Path = Sequence[tuple[Hashable, int]]


def path_of_texts(texts: Sequence[tuple[int, int]], block_size: int) -> list[tuple[Hashable, int]]:
    """The path of (text, tokens) pairs, each pair the first tokens of a text of that number.

    A block that reaches over the end of a text belongs to the text that its last token is of. Texts without a block of
    their own are part of the name of the next one.
    """
    path: list[tuple[Hashable, int]] = []
    name: tuple[int, ...] = ()
    at = blocks = 0
    for text, tokens in texts:
        name += (at, text)
        at += tokens
        if at // block_size > blocks:
            blocks = at // block_size
            path.append((name, blocks))
            name = ()
    return path


def path_of_ids(ids: Sequence[int], block_size: int) -> list[tuple[Hashable, int]]:
    """The path of token ids: a stretch per block."""
    blocks = len(ids) // block_size
    return [(hash(tuple(ids[i * block_size : (i + 1) * block_size])), i + 1) for i in range(blocks)]


class _Stretch:
    """Blocks `first` to `cached` of a text behind one history, those up to `live` in use. Blocks are counted from
    the path's start.

    A stretch in use holds its parent up to `first`; so a parent's blocks are given back later than its children's.
    """

    __slots__ = ("cached", "children", "first", "holders", "idle", "live", "name", "parent")

    def __init__(self, parent: _Stretch | None, name: Hashable, first: int) -> None:
        self.parent = parent
        self.name = name
        self.first = self.live = self.cached = first
        self.children: dict[Hashable, _Stretch] = {}
        self.holders: dict[int, int] = {}  # up to which block → how many calls and children use it
        self.idle: list[_Idle] = []  # deepest and oldest first; together they are the blocks from live to cached


@dataclass(slots=True, eq=False)
class _Idle:
    """Blocks of a stretch that were given back together."""

    stretch: _Stretch
    begin: int
    end: int


class Found(NamedTuple):
    """What the cache has of a path: `cached` leading blocks, `live` of them in use by some call."""

    cached: int
    live: int


class Hold(NamedTuple):
    """One call's use of a path: a stretch, up to a block of it."""

    stretch: _Stretch
    upto: int


class KVCache:
    """All blocks of an engine: private ones, cached ones in use, and idle cached ones that are kept until needed.

    Attributes:
        version: changes whenever a call that did not fit may fit.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.private = self.live = self.idle = 0
        self.version = 0
        self._root = _Stretch(None, None, 0)
        self._lru: OrderedDict[_Idle, None] = OrderedDict()

    @property
    def used(self) -> int:
        """Blocks that calls hold now."""
        return self.private + self.live

    @property
    def free(self) -> int:
        """Blocks that can be had, idle ones included."""
        return self.size - self.private - self.live

    def find(self, path: Path, most: int) -> Found:
        """What is cached of the first `most` blocks of a path."""
        node, cached, live = self._root, 0, 0
        for name, end in path:
            if cached >= most or (child := node.children.get(name)) is None:
                break
            upto = min(end, most)
            if child.live > child.first:
                live = min(child.live, upto)
            cached = min(child.cached, upto)
            if cached < end:
                break
            node = child
        return Found(cached, live)

    def take(self, blocks: int) -> None:
        """Hands out private blocks, of which enough must be free; evicts idle ones for them."""
        self.private += blocks
        over = self.private + self.live + self.idle - self.size
        if over > 0:
            self._evict(over)

    def drop(self, blocks: int) -> None:
        """Takes private blocks back."""
        self.private -= blocks
        self.version += 1

    def hold(self, path: Path, blocks: int, private: int) -> Hold | None:
        """Uses the first `blocks` blocks of a path. Those that were not cached are so from now on.

        Args:
            private: how many of the blocks were private ones of this call; all that were not cached must be.
        """
        node, reached = self._root, 0
        for name, end in path:
            if reached >= blocks:
                break
            child = node.children.get(name)
            if child is None:
                child = node.children[name] = _Stretch(node, name, reached)
            node, reached = child, min(end, blocks)
            node.cached = max(node.cached, reached)
        if not reached:
            return None
        self.private -= private
        self._acquire(node, reached)
        self.version += 1
        return Hold(node, reached)

    def let_go(self, held: Hold | None) -> None:
        """Ends one use. What nobody uses any more is idle."""
        if held is not None:
            self._give_back(*held)
            self.version += 1

    def alone(self, held: Hold | None) -> int:
        """Blocks that nobody else uses: idle if this one is let go."""
        blocks = 0
        node, upto = held or (self._root, 0)
        while node.parent is not None and node.holders[upto] == 1:
            blocks += node.live - max((u for u in node.holders if u != upto), default=node.first)
            if len(node.holders) > 1:
                break
            node, upto = node.parent, node.first
        return blocks

    def _acquire(self, node: _Stretch, upto: int) -> None:
        while node.parent is not None:
            was_in_use = bool(node.holders)
            node.holders[upto] = node.holders.get(upto, 0) + 1
            if upto > node.live:
                self._wake(node, upto)
            if was_in_use:
                return
            node, upto = node.parent, node.first

    def _wake(self, node: _Stretch, upto: int) -> None:
        while node.idle and node.idle[-1].begin < upto:
            part = node.idle[-1]
            self.idle -= min(part.end, upto) - part.begin
            if part.end > upto:
                part.begin = upto
            else:
                del self._lru[node.idle.pop()]
        self.live += upto - node.live
        node.live = upto

    def _give_back(self, node: _Stretch, upto: int) -> None:
        while node.parent is not None:
            node.holders[upto] -= 1
            if not node.holders[upto]:
                del node.holders[upto]
                if upto == node.live:
                    self._lay_down(node, max(node.holders, default=node.first))
            if node.holders:
                return
            node, upto = node.parent, node.first

    def _lay_down(self, node: _Stretch, upto: int) -> None:
        part = _Idle(node, upto, node.live)
        node.idle.append(part)
        self._lru[part] = None
        self.idle += node.live - upto
        self.live -= node.live - upto
        node.live = upto

    def _evict(self, blocks: int) -> None:
        self.idle -= blocks
        while blocks > 0:
            part = next(iter(self._lru))
            node, gone = part.stretch, min(blocks, part.end - part.begin)
            blocks -= gone
            part.end -= gone
            node.cached -= gone
            if part.begin == part.end:
                del self._lru[part]
                node.idle.pop(0)
                if node.cached == node.first and node.parent is not None:
                    del node.parent.children[node.name]

"""The KV cache of a modelled engine: blocks in use, and a radix tree of cached prefixes with LRU eviction.

The tokens of a call are a `Path`: a sequence of texts, cut into blocks. A block is identified by all tokens up to its
last one. The tree does not store single blocks but stretches: all blocks between two branching points, even if they are
a hundred turns of a conversation and nine thousand blocks. The order of eviction is exactly that of single blocks:
blocks that were released first are evicted first; among blocks that were released together, a call's end is evicted
before its beginning.

One difference from vLLM: if two calls compute the same full block, it is stored once as soon as both have published it;
vLLM keeps both copies while both calls run. That is at most one block per call, because at least one token of a prompt
is always computed.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from itertools import count
from typing import NamedTuple

# A text: its name, which includes its offset, and the number of full blocks of the path up to its end.
Element = tuple[Hashable, int]
Path = Sequence[Element]


class PathBuilder:
    """Builds a path from texts, each given as its number and its length in tokens.

    A block that spans several texts belongs to the text of its last token. Texts without a block of their own are part
    of the name of the next one.
    """

    __slots__ = ("_blocks", "_name", "_size", "path", "tokens")

    def __init__(self, block_size: int) -> None:
        self._size = block_size
        self._name: tuple[int, ...] = ()
        self._blocks = 0
        self.tokens = 0
        self.path: list[Element] = []

    def add(self, texts: Iterable[tuple[int, int]]) -> None:
        """Appends texts."""
        size, tokens, blocks, name = self._size, self.tokens, self._blocks, self._name
        for text, length in texts:
            name += (tokens, text)
            tokens += length
            if tokens // size > blocks:
                blocks = tokens // size
                self.path.append((name, blocks))
                name = ()
        self.tokens, self._blocks, self._name = tokens, blocks, name

    def copy(self) -> PathBuilder:
        """An independent copy."""
        other = PathBuilder(self._size)
        other._name, other._blocks, other.tokens, other.path = self._name, self._blocks, self.tokens, self.path[:]
        return other


def path_of_texts(texts: Iterable[tuple[int, int]], block_size: int) -> list[Element]:
    """The path of texts."""
    builder = PathBuilder(block_size)
    builder.add(texts)
    return builder.path


def path_of_ids(ids: Sequence[int], block_size: int) -> list[Element]:
    """The path of token ids. Each block is a text of its own."""
    blocks = len(ids) // block_size
    return [(hash(tuple(ids[i * block_size : (i + 1) * block_size])), i + 1) for i in range(blocks)]


class _Stretch:
    """Blocks `first` to `cached` of paths with a common prefix, in use up to `live`; counted from the path's start.

    A stretch in use holds its parent up to `first`, so a parent's blocks are released after its children's. It may have
    more of its last text than the part after which a child begins; no child has a longer copy of the same text.
    """

    __slots__ = ("cached", "children", "elements", "first", "holders", "idle", "live", "parent")

    def __init__(self, parent: _Stretch | None, elements: list[Element], first: int) -> None:
        self.parent = parent
        self.elements = elements
        self.first = self.live = self.cached = first
        self.children: dict[Hashable, _Stretch] = {}
        self.holders: dict[int, int] = {}  # last block in use -> the number of calls and children that use it
        self.idle: list[_Idle] = []  # the blocks from live to cached, deepest and oldest first

    def common(self, path: Path, at: int) -> tuple[int, int]:
        """Compares with a path whose text at index `at` is the stretch's first one. Returns how many texts they share,
        the last one perhaps only in part, and the number of blocks of the path up to there."""
        own = self.elements
        last = len(own) - 1
        if (not last or path[at : at + last] == own[:last]) and at + last < len(path):
            if path[at + last][0] == own[last][0]:
                return last + 1, path[at + last][1]
            return last, own[last - 1][1]
        for n, (mine, theirs) in enumerate(zip(own, path[at:], strict=False)):
            if mine[0] != theirs[0]:
                return n, own[n - 1][1]
            if mine[1] != theirs[1]:
                return n + 1, min(mine[1], theirs[1])
        return len(path) - at, path[-1][1]


@dataclass(slots=True, eq=False)
class _Idle:
    """Blocks of a stretch that were released together, at time `stamp`."""

    stretch: _Stretch
    begin: int
    end: int
    stamp: int


class Found(NamedTuple):
    """The cached part of a path: `cached` leading blocks, `live` of them in use."""

    cached: int
    live: int


class Hold(NamedTuple):
    """One call's use of a path, up to a block of this stretch or of an ancestor that was split off it."""

    stretch: _Stretch
    upto: int

    def place(self) -> tuple[_Stretch, int]:
        """The stretch that now has the last block, and that block."""
        node, upto = self
        while upto <= node.first and node.parent is not None:
            node = node.parent
        return node, upto


class KVCache:
    """All blocks of an engine: private ones, cached ones in use, and idle cached ones that can be evicted.

    Attributes:
        version: changes whenever a call that did not fit may fit.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.private = self.live = self.idle = 0
        self.version = 0
        self._root = _Stretch(None, [], 0)
        self._stamps = count()
        # A heap in the order of eviction: by time, then from the end. Parts that are in use again are empty.
        self._lru: list[tuple[int, int, int, _Idle]] = []
        self._parts = 0  # those that are not empty

    @property
    def used(self) -> int:
        """Blocks that calls use now."""
        return self.private + self.live

    @property
    def free(self) -> int:
        """Blocks that can be taken, including idle ones."""
        return self.size - self.private - self.live

    def find(self, path: Path, most: int) -> Found:
        """The cached part of the first `most` blocks of a path."""
        node, at, cached, live = self._root, 0, 0, 0
        while at < len(path) and cached < most and (child := node.children.get(path[at][0])) is not None:
            texts, end = child.common(path, at)
            upto = min(end, most)
            if child.live > child.first:
                live = min(child.live, upto)
            cached = min(child.cached, upto)
            if texts < len(child.elements) or cached < end:
                break
            node, at = child, at + texts
        return Found(cached, live)

    def take(self, blocks: int) -> None:
        """Takes private blocks, evicting idle ones if needed. Enough must be free."""
        self.private += blocks
        over = self.private + self.live + self.idle - self.size
        if over > 0:
            self._evict(over)

    def drop(self, blocks: int) -> None:
        """Frees private blocks."""
        self.private -= blocks
        self.version += 1

    def hold(self, path: Path, blocks: int, private: int) -> Hold | None:
        """Uses the first `blocks` blocks of a path. All of them are cached from now on.

        Args:
            private: how many of the blocks were private ones of this call; those that were not cached must be.
        """
        if not blocks:
            return None
        node, at, reached = self._root, 0, 0
        while reached < blocks:
            child = node.children.get(path[at][0])
            if child is None:
                node = self._append(node, path, at, reached, blocks)
                break
            texts, end = child.common(path, at)
            if texts < len(child.elements) and end < blocks:
                child = self._split(child, texts)
            node, at = child, at + texts
            reached = min(path[at - 1][1], blocks)
            node.cached = max(node.cached, reached)
        self.private -= private
        self._acquire(node, blocks)
        self.version += 1
        return Hold(node, blocks)

    def release(self, held: Hold | None) -> None:
        """Ends one use. Blocks that no call uses any more become idle."""
        if held is not None:
            self._release(*held.place())
            self.version += 1

    def only_used_by(self, held: Hold | None) -> int:
        """Blocks that only this call uses; releasing it would make them idle."""
        blocks = 0
        node, upto = held.place() if held is not None else (self._root, 0)
        while node.parent is not None and node.holders[upto] == 1:
            blocks += node.live - max((u for u in node.holders if u != upto), default=node.first)
            if len(node.holders) > 1:
                break
            node, upto = node.parent, node.first
        return blocks

    # -- the tree

    def _append(self, node: _Stretch, path: Path, at: int, reached: int, blocks: int) -> _Stretch:
        """Appends texts after a stretch: to the stretch itself if nothing follows it, otherwise in a new child."""
        new = []
        for element in path[at:]:
            new.append(element)
            if element[1] >= blocks:
                break
        if node.parent is not None and not node.children and node.cached == reached:
            node.elements[-1] = path[at - 1]
            node.elements += new
        else:
            child = _Stretch(node, new, reached)
            node.children[new[0][0]] = child
            node = child
        node.cached = blocks
        return node

    def _split(self, node: _Stretch, texts: int) -> _Stretch:
        """Splits a stretch after `texts` texts; returns the upper part. The lower part stays the same object, for calls
        that hold it (`Hold.place`)."""
        parent, cut = node.parent, node.elements[texts - 1][1]
        top = _Stretch(parent, node.elements[:texts], node.first)
        if parent is not None:
            parent.children[top.elements[0][0]] = top
        node.elements = node.elements[texts:]
        node.parent, node.first = top, cut
        top.holders = {upto: n for upto, n in node.holders.items() if upto <= cut}
        node.holders = {upto: n for upto, n in node.holders.items() if upto > cut}
        if node.holders:
            top.holders[cut] = top.holders.get(cut, 0) + 1
        top.live, node.live = min(node.live, cut), max(node.live, cut)
        top.cached, node.cached = min(node.cached, cut), max(node.cached, cut)
        self._split_idle(top, node, cut)
        if node.cached > cut:
            top.children[node.elements[0][0]] = node
        return top

    def _split_idle(self, top: _Stretch, node: _Stretch, cut: int) -> None:
        parts, node.idle = node.idle, []
        for part in parts:
            if part.end <= cut:
                part.stretch = top
                top.idle.append(part)
                continue
            if part.begin < cut:
                self._note(_Idle(top, part.begin, cut, part.stamp))
                part.begin = cut
                self._queue(part)  # again, at its new position
            node.idle.append(part)

    # -- use

    def _acquire(self, node: _Stretch, upto: int) -> None:
        while node.parent is not None:
            was_in_use = bool(node.holders)
            node.holders[upto] = node.holders.get(upto, 0) + 1
            if upto > node.live:
                self._revive(node, upto)
            if was_in_use:
                return
            node, upto = node.parent, node.first

    def _revive(self, node: _Stretch, upto: int) -> None:
        while node.idle and node.idle[-1].begin < upto:
            part = node.idle[-1]
            self.idle -= min(part.end, upto) - part.begin
            part.begin = min(part.end, upto)
            if part.begin == part.end:
                node.idle.pop()
                self._parts -= 1
        self.live += upto - node.live
        node.live = upto

    def _release(self, node: _Stretch, upto: int) -> None:
        stamp = next(self._stamps)
        while node.parent is not None:
            node.holders[upto] -= 1
            if not node.holders[upto]:
                del node.holders[upto]
                if upto == node.live:
                    self._make_idle(node, max(node.holders, default=node.first), stamp)
            if node.holders:
                return
            node, upto = node.parent, node.first

    def _make_idle(self, node: _Stretch, upto: int, stamp: int) -> None:
        self._note(_Idle(node, upto, node.live, stamp))
        self.idle += node.live - upto
        self.live -= node.live - upto
        node.live = upto

    def _note(self, part: _Idle) -> None:
        part.stretch.idle.append(part)
        self._parts += 1
        self._queue(part)

    def _queue(self, part: _Idle) -> None:
        if len(self._lru) > 2 * self._parts + 64:
            self._lru = [entry for entry in self._lru if entry[3].begin < entry[3].end]
            heapify(self._lru)
        heappush(self._lru, (part.stamp, -part.begin, next(self._stamps), part))

    def _evict(self, blocks: int) -> None:
        self.idle -= blocks
        while blocks > 0:
            part = self._lru[0][3]
            gone = min(blocks, part.end - part.begin)
            if gone:
                blocks -= gone
                part.end -= gone
                part.stretch.cached -= gone
            if part.begin == part.end:
                heappop(self._lru)
                if gone:
                    self._parts -= 1
                    self._emptied(part.stretch)

    def _emptied(self, node: _Stretch) -> None:
        """The deepest part of a stretch was evicted."""
        node.idle.pop(0)
        if node.cached == node.first and node.parent is not None:
            del node.parent.children[node.elements[0][0]]

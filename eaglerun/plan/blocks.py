"""BlockPool: which KV blocks are free, shared or kept for their prefix. Bookkeeping only."""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence

from eaglerun.errors import EngineError


def root_name(salt: str) -> bytes:
    """The parent of a first block: prompts share blocks only under the same salt."""
    return hashlib.blake2b(salt.encode(), digest_size=16).digest()


def hash_block(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Name of a full block: of its tokens and of everything before it (``parent``)."""
    return hashlib.blake2b(array("q", token_ids).tobytes(), digest_size=16, key=parent).digest()


class BlockPool:
    """Reference counts and prefix names of ``num_blocks`` KV blocks of ``block_size`` tokens.

    A block is *held* (count > 0), *kept* (count 0, but published: a later prompt with the same
    prefix may take it) or *blank*. Blank blocks are handed out first, then kept ones, least
    recently released first.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._count = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._name: dict[int, bytes] = {}
        self._by_name: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        """Blocks that ``allocate`` could hand out now, kept ones included."""
        return len(self._free)

    @property
    def num_held(self) -> int:
        return self.num_blocks - len(self._free)

    def allocate(self, n: int) -> list[int]:
        """Take ``n`` blocks with count 1. EngineError if fewer are free: callers look first."""
        if n > len(self._free):
            raise EngineError(f"{n} KV blocks asked for, {len(self._free)} free")
        taken = []
        for _ in range(n):
            block, _ = self._free.popitem(last=False)
            self._forget(block)
            self._count[block] = 1
            taken.append(block)
        return taken

    def match(self, names: Iterable[bytes]) -> list[int]:
        """The blocks published under the longest prefix of ``names``; their counts do not move."""
        found = []
        for name in names:
            block = self._by_name.get(name)
            if block is None:
                break
            found.append(block)
        return found

    def num_kept(self, blocks: Iterable[int]) -> int:
        """How many of ``blocks`` are free now: sharing them takes them off the free list."""
        return sum(self._count[block] == 0 for block in blocks)

    def share(self, blocks: Iterable[int]) -> None:
        for block in blocks:
            if self._count[block] == 0:
                del self._free[block]
            self._count[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Give one count of each back; a sequence's last blocks are reused before its first."""
        for block in reversed(blocks):
            if self._count[block] == 0:
                raise EngineError(f"KV block {block} released twice")
            self._count[block] -= 1
            if self._count[block] == 0:
                self._free[block] = None
                if block not in self._name:
                    self._free.move_to_end(block, last=False)

    def publish(self, block: int, name: bytes) -> None:
        """Let later prompts find a full, computed block. A name already taken keeps its block."""
        if name not in self._by_name and block not in self._name:
            self._by_name[name] = block
            self._name[block] = name

    def published(self) -> Iterable[int]:
        """Blocks that a later prompt can find."""
        return self._name.keys()

    def check_integrity(self, held: Iterable[Sequence[int]]) -> None:
        """EngineError unless the counts are exactly those of the block tables in ``held``."""
        count = [0] * self.num_blocks
        for table in held:
            for block in table:
                count[block] += 1
        wrong = [b for b in range(self.num_blocks) if count[b] != self._count[b]]
        free_wrong = [
            b for b in range(self.num_blocks) if (self._count[b] == 0) != (b in self._free)
        ]
        if wrong or free_wrong:
            b = (wrong or free_wrong)[0]
            raise EngineError(
                f"KV block {b}: count {self._count[b]}, held by {count[b]} tables, "
                f"{'free' if b in self._free else 'not free'}"
            )
        if any(self._by_name.get(name) != b for b, name in self._name.items()):
            raise EngineError("prefix names and blocks disagree")

    def _forget(self, block: int) -> None:
        name = self._name.pop(block, None)
        if name is not None:
            del self._by_name[name]

"""A round's proof: what its workers' digests have to be, taken from the source's values while bytes travel."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from weightcast.content.expected import ExpectedDigest
from weightcast.digest.versions import version_name
from weightcast.errors import DigestMismatch, WeightcastError
from weightcast.layout.memory import Memory
from weightcast.manifest import Manifest
from weightcast.trainer.fleet.places import Tie
from weightcast.trainer.fleet.ties import Digests
from weightcast.trainer.ranks.shared_digest import SharedDigest
from weightcast.transports.kept import Kept


def _never(digest: ExpectedDigest) -> Callable[[], int]:
    raise AssertionError("the proof was not started")


class RoundProof:
    """Used once, in this order: ``start``, ``compute``, ``settle``, and ``check`` for each worker.

    ``expected`` has the digests that workers ask for, by key; ``content`` is that of everything that is published; ``ties`` has the
    digests of both tensors of each tie whose values have to be compared. Where all values that a key stands for were compared with
    those of the round before, as ``kept`` knows, the digest follows from what changed.
    """

    def __init__(
        self,
        content: ExpectedDigest | SharedDigest,
        expected: Mapping[str, ExpectedDigest | SharedDigest],
        manifest: Manifest,
        number: int,
        ties: Mapping[Tie, Digests] | None = None,
        *,
        kept: Kept,
        round: int,
    ) -> None:
        self._kept, self._round = kept, round
        self._source_content, self._source_expected = content, expected
        self._manifest, self._number, self._ties = manifest, number, ties or {}
        self._waits: dict[ExpectedDigest | SharedDigest, Callable[[], int]] = {}
        self._wanted: dict[str, ExpectedDigest | SharedDigest] = {}
        self._short: dict[ExpectedDigest, str] = {}
        """Digests that follow from what changed, and their keys."""
        self._start_of: Callable[[ExpectedDigest], Callable[[], int]] = _never
        self._found: dict[ExpectedDigest | SharedDigest, int] | None = None
        self._error: WeightcastError | None = None
        self.content = 0
        """The digest of everything that is published, once settled."""
        self.expected: dict[str, int] = {}
        """What workers' digests have to be, by key, once settled."""
        self.version = ""
        """The version's name, once settled."""

    def start(
        self, keys: Iterable[str], memory: Memory, check: Callable[[], None], changing: Iterable[str] = ()
    ) -> None:
        """Have a GPU digest the source's memory from now on; elsewhere ``compute`` does all of it. ``check`` is called while a CPU
        digests and may raise. ``changing`` are keys of values that are compared with those before until ``settle`` is called."""
        self._wanted = {key: self._source_expected[key] for key in keys}
        tied = [digest for pair in self._ties.values() for digest in pair]
        for key in changing:
            digest = self._wanted[key]
            if isinstance(digest, ExpectedDigest) and digest not in tied and self._kept.is_short(key):
                self._short[digest] = key
        self._start_of = lambda digest: digest.start(memory, check)
        each = dict.fromkeys([self._source_content, *self._wanted.values(), *tied])
        self._waits = {digest: digest.start(memory, check) for digest in each if digest not in self._short}

    def take(self, window: int, memory: Memory, check: Callable[[], None], known: int | None) -> None:
        """Digest a window of a stream, which is filled now and will be filled again; ``known`` is the digest of all of it, if known."""
        for digest in self._waits:
            digest.take(window, memory, check, known)

    def compute(self) -> None:
        """Finish the digests. An error of weightcast's is kept for ``settle``: bytes that travel meanwhile may be about to fail for
        another reason, which says more."""
        # A wait refers to the round, and through it to the source's memory: a cycle that would outlive both.
        waits, self._waits = self._waits, {}
        try:
            self._found = {digest: wait() for digest, wait in waits.items()}
        except WeightcastError as error:
            self._error = error

    def settle(self) -> None:
        """Raise the error that ``compute`` kept, or make its results known; computes first where nobody did."""
        if self._found is None and self._error is None:
            self.compute()
        if self._error is not None:
            raise self._error
        assert self._found is not None
        start_of, self._start_of = self._start_of, _never  # as above: no cycle is left
        for short, key in self._short.items():
            known = self._kept.digest(key, self._round)
            if known is None:
                known = start_of(short)()
                self._kept.learn(key, self._round, known)
            self._found[short] = known
        for key, wanted in self._wanted.items():
            if isinstance(wanted, ExpectedDigest) and wanted not in self._short:
                self._kept.learn(key, self._round, self._found[wanted])
        self.content = self._found[self._source_content]
        self.expected = {key: self._found[digest] for key, digest in self._wanted.items()}
        self.version = version_name(self._number, self._manifest, self.content)

    def check_ties(self, ties: Iterable[Tie]) -> None:
        """Raise PlanMismatch where two tensors that an engine keeps as one have different values now."""
        assert self._found is not None
        for tie in ties:
            first, second = self._ties[tie]
            if self._found[first] != self._found[second]:
                raise tie.unequal()

    def check(self, key: str, digest: int, what: str) -> None:
        """Raise DigestMismatch unless a worker with this key has what the source holds."""
        if digest != self.expected[key]:
            raise DigestMismatch(
                f"{what} weights have digest {digest:016x}, the trainer's are {self.expected[key]:016x}",
                hint="Bytes were lost, torn, or changed since publish(), or prepare(), was called",
            )

"""Steps: what one trainer rank sends to a group of workers, bucket by bucket: once to all what all want, the rest to each its own.

Pure. Both sides derive the same steps: the trainer from all workers' copies, a worker from its own and from what the offer
says about the others (``Share``). Common buckets come first. Then the workers' own ones travel side by side, each at most
``part_nbytes``, so that a step of either kind fits into one buffer of the trainer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import msgspec

from weightcast.errors import ProtocolError
from weightcast.manifest import ALIGNMENT
from weightcast.plan import Copy
from weightcast.transports.buckets import Bucket, check_bucket_nbytes, schedule


class Share(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one worker has to know of its group: which of its copies all others want, too, in the order in which they come,
    and the bytes of every bucket that it will receive, to see that both sides cut alike."""

    bucket_nbytes: int
    part_nbytes: int
    common: tuple[int, ...]
    nbytes: tuple[int, ...]


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """Buckets that travel together: one for all workers, or by worker number one for each that still gets something."""

    for_all: Bucket | None
    own: dict[int, Bucket]

    @property
    def nbytes(self) -> int:
        """Bytes that leave the trainer if a broadcast counts once."""
        return self.for_all.nbytes if self.for_all is not None else sum(bucket.nbytes for bucket in self.own.values())


def divide(parts: Sequence[Sequence[Copy]], bucket_nbytes: int) -> tuple[tuple[Step, ...], tuple[Share, ...]]:
    """The trainer's steps for workers with these copies (at least one worker), and each worker's Share.

    InvalidInput for a bucket size that is no positive multiple of 256.
    """
    check_bucket_nbytes(bucket_nbytes)
    part_nbytes = max(bucket_nbytes // len(parts) // ALIGNMENT * ALIGNMENT, ALIGNMENT)
    wanted = [_numbered(copies) for copies in parts]
    everywhere = set(wanted[0]).intersection(*wanted[1:])
    common = [key for key in wanted[0] if key in everywhere]
    common_of = [tuple(numbers[key] for key in common) for numbers in wanted]
    for_all = schedule([parts[0][number] for number in common_of[0]], bucket_nbytes)
    own = [schedule(_without(copies, numbers), part_nbytes) for copies, numbers in zip(parts, common_of, strict=True)]
    steps = [Step(for_all=bucket, own={}) for bucket in for_all]
    for at in range(max(map(len, own))):
        steps.append(Step(for_all=None, own={n: buckets[at] for n, buckets in enumerate(own) if at < len(buckets)}))
    shares = tuple(
        Share(
            bucket_nbytes=bucket_nbytes,
            part_nbytes=part_nbytes,
            common=numbers,
            nbytes=tuple(bucket.nbytes for bucket in (*for_all, *buckets)),
        )
        for numbers, buckets in zip(common_of, own, strict=True)
    )
    return tuple(steps), shares


def receive_buckets(copies: Sequence[Copy], share: Share) -> tuple[tuple[Bucket, ...], int]:
    """What a worker receives, in order, and how many of these buckets are for all. ProtocolError when the share does not
    fit the copies."""
    check_bucket_nbytes(share.bucket_nbytes)
    check_bucket_nbytes(share.part_nbytes)
    if len(set(share.common)) < len(share.common) or any(not 0 <= n < len(copies) for n in share.common):
        raise ProtocolError("the offer's common copies are not in the plan, or twice")
    for_all = schedule([copies[number] for number in share.common], share.bucket_nbytes)
    buckets = (*for_all, *schedule(_without(copies, share.common), share.part_nbytes))
    if tuple(bucket.nbytes for bucket in buckets) != share.nbytes:
        raise ProtocolError(
            "the trainer cuts the plan into other buckets", hint="Use the same weightcast on both sides"
        )
    return buckets, len(for_all)


def _numbered(copies: Sequence[Copy]) -> dict[tuple[object, ...], int]:
    """Copies by what travels for them and, where a worker has the same values land twice, which time it is."""
    seen: Counter[tuple[object, ...]] = Counter()
    numbers: dict[tuple[object, ...], int] = {}
    for number, copy in enumerate(copies):
        key = (copy.region, copy.src_storage, copy.src_dtype, copy.src_offset, copy.src_strides, copy.dst_dtype)
        numbers[*key, seen[key]] = number
        seen[key] += 1
    return numbers


def _without(copies: Sequence[Copy], numbers: Sequence[int]) -> list[Copy]:
    left_out = set(numbers)
    return [copy for number, copy in enumerate(copies) if number not in left_out]

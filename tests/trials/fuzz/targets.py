"""Targets: functions of arbitrary bytes that must end well, or in an error that weightcast names. Anything else is a finding."""

from __future__ import annotations

import itertools
import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from unittest.mock import patch

import httpcore
import msgspec
import numpy as np

from weightcast.control.link import JoinInfo
from weightcast.control.pieces import Joiner, cut
from weightcast.deadline import Deadline
from weightcast.delta import Form, Kind, Stretch, find
from weightcast.delta import decode as decode_changes
from weightcast.delta import encode as encode_changes
from weightcast.errors import ErrorForm, InvalidInput, PeerLost, ProtocolError, RoundFailed, StateError, WeightcastError
from weightcast.facts import Facts
from weightcast.layout import image_layout
from weightcast.layout.geometry import span
from weightcast.layout.table import LayoutTable
from weightcast.manifest import Manifest, TensorSpec
from weightcast.messages import (
    Abort,
    Begin,
    Bye,
    Committed,
    Failed,
    Filled,
    Heartbeat,
    Hello,
    Landings,
    LetGo,
    Message,
    Offer,
    RankAnswer,
    RankOrder,
    Read,
    Ready,
    Refused,
    Setup,
    Staged,
    Verified,
    Welcome,
    decode,
    encode,
)
from weightcast.plan import Copy, CopyColumns, Holdings, compile_plan
from weightcast.receiver.worker_round import Approval, RoundId, WorkerRound
from weightcast.receiver.worker_round import Phase as RoundPhase
from weightcast.report.model import Phase, Report
from weightcast.server.body import decode as decode_body
from weightcast.server.control_routes import CommitBody, InitBody, RollbackBody
from weightcast.server.rl_schemas import UpdateBody
from weightcast.server.schemas import ChatRequest, CompletionRequest
from weightcast.trainer.clients import HttpEngineClient, wire
from weightcast.trainer.clients.base import CommitOrder
from weightcast.trainer.fleet.link import EngineLink
from weightcast.trainer.ranks.orders import Answer as RankReply
from weightcast.trainer.ranks.orders import (
    Enter,
    Finish,
    Pair,
    Survey,
    decode_answer,
    decode_order,
)
from weightcast.trainer.ranks.orders import encode as encode_body
from weightcast.transports.registry import registry
from weightcast.transports.rendezvous import SECRET_NBYTES, Caller
from weightcast.transports.shm import ShmOffer
from weightcast.transports.tcp import TcpOffer
from weightcast.untrusted.known import known
from weightcast.untrusted.safetensors_format import read_header

Target = Callable[[bytes], None]
BODIES: tuple[type[msgspec.Struct], ...] = (
    InitBody,
    CommitBody,
    RollbackBody,
    UpdateBody,
    CompletionRequest,
    ChatRequest,
)
MANIFEST = Manifest.of(
    [TensorSpec(name="w", dtype="bfloat16", shape=(3, 4)), TensorSpec(name="s", dtype="int64", shape=())]
)
LAYOUT = image_layout(MANIFEST)
TABLE = LayoutTable.of(LAYOUT, MANIFEST)
FORM = Form([Stretch(0, 600, Kind(2, False)), Stretch(768, 64, Kind(4, True))], 832)
TRANSPORTS = ("shm", "tcp")
STATUSES = (200, 409, 500, 422, 404, 204)


def frames(data: bytes) -> None:
    """A frame of the control channel is a message, which says the same when it is sent again, or ProtocolError."""
    try:
        message = decode(data)
    except ProtocolError:
        return
    heard = decode(encode(message))
    if heard != message and "nan" not in repr(message):
        raise AssertionError(f"{message} became {heard}")


def setups(data: bytes) -> None:
    """Whatever holdings a trainer claims, compiling a plan with them ends in a plan inside both memories, or in an error."""
    try:
        message = decode(data)
        if not isinstance(message, Setup):
            return
        plan = compile_plan(MANIFEST, Holdings.told(MANIFEST, message.holdings), LAYOUT)
    except WeightcastError:
        return
    for copies in plan.values():
        for copy in copies:
            reach = copy.src_offset + span(copy.sizes, copy.src_strides)
            if copy.nbytes > sum(LAYOUT.storage_nbytes) or not 0 <= reach < 2**63:
                raise AssertionError(f"{copy} does not fit")


def offers(data: bytes) -> None:
    """A transport's offer is a worker's end, which connects nowhere yet, or an error."""
    whole = tuple(compile_plan(MANIFEST, {0: LAYOUT}, LAYOUT)[0])
    for name in TRANSPORTS:
        copies: tuple[Copy, ...] = whole if len(data) % 2 else ()
        with suppress(WeightcastError):
            registry().get(name).worker_end(data, copies).close()


def landings(data: bytes) -> None:
    """Whatever a worker says that it wants, the trainer's plan for it stays inside both memories, or there is an error."""
    try:
        message = decode(data)
        if not isinstance(message, Landings):
            return
        message.layout.check_landings(MANIFEST)
        plan = compile_plan(MANIFEST, {0: LAYOUT}, message.layout)
        assert len(plan.digest) == len(plan.key)
        sizes = message.layout.layout(MANIFEST).storage_nbytes
    except WeightcastError:
        return
    for copies in plan.values():
        for copy in copies:
            if copy.nbytes > sum(LAYOUT.storage_nbytes) or copy.dst_storage >= len(sizes):
                raise AssertionError(f"{copy} does not fit")


def headers(data: bytes) -> None:
    """The bytes of a safetensors file are tensors that lie inside it, one behind the other, or InvalidInput."""
    file = os.memfd_create("weightcast-fuzz", os.MFD_CLOEXEC)
    try:
        os.write(file, data)
        tensors = read_header(file, "x").tensors.values()
    except InvalidInput:
        return
    finally:
        os.close(file)
    for before, stored in itertools.pairwise([None, *tensors]):
        assert stored is not None
        if stored.begin < (8 if before is None else before.end) or stored.end > len(data):
            raise AssertionError(f"{stored} lies outside of its place")


def changes(data: bytes) -> None:
    """What changed in a bucket is changes of its values, or ProtocolError."""
    with suppress(ProtocolError):
        for kind, positions, values in decode_changes(FORM, data):
            if len(values) != len(positions) or positions[-1] >= FORM.ends[kind][-1]:
                raise AssertionError(f"{len(values)} values, the last one at {positions[-1]}")


def pieces(data: bytes) -> None:
    """Pieces of frames, however they are cut and mixed, are frames of the length that is allowed, or ProtocolError."""
    joiner, at = Joiner(), 0
    while at < len(data):
        length = data[at]
        with suppress(ProtocolError):
            frame = joiner.add(data[at + 1 : at + 1 + length], 300)
            if frame is not None and len(frame) > 300:
                raise AssertionError(f"a frame of {len(frame)} bytes")
        at += 1 + length


def callers(data: bytes) -> None:
    """Whatever somebody says who connects to a pair's listener: nobody is let in who does not know the secret."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        caller = Caller(ours, b"s" * SECRET_NBYTES)
        theirs.sendall(data[:4096])
        for _ in range(4):
            caller.listen()
        if caller.is_in:
            raise AssertionError("a stranger got in")


def ranks(data: bytes) -> None:
    """What trainer ranks tell each other is an order or an answer, which says the same when it is sent again, or an error."""
    for decoded in (decode_order, decode_answer):
        try:
            body = decoded(data)
        except ProtocolError:
            continue
        if decoded(encode_body(body)) != body and "nan" not in repr(body):
            raise AssertionError(f"{body} is heard as another one when it is sent again")
        form = getattr(body, "error", None)
        if form is not None:
            str(form.error())


def answers(data: bytes) -> None:
    """Whatever a server answers: each call of the trainer gives what it promises, or an error that weightcast names."""
    status, content = STATUSES[data[0] % len(STATUSES)] if data else 200, data[1:]
    client = HttpEngineClient("http://127.0.0.1:1")
    order, deadline = CommitOrder(epoch=1, round=2, version="3-ab"), Deadline(60)
    response = httpcore.Response(status, content=content)
    response.read()
    with patch.object(wire, "request", lambda *_: response):
        with suppress(WeightcastError):
            if client.world_size(deadline) < 1:
                raise AssertionError("an engine without workers")
        with suppress(WeightcastError):
            for name, seconds in client.commit(order, deadline).phases.items():
                Phase(name=name, start_s=0.0, seconds=seconds)
        with suppress(WeightcastError):
            EngineLink(client).learn(client.status(deadline))
        calls: tuple[Callable[[], None], ...] = (
            lambda: client.init({}, deadline),
            lambda: client.rollback(1, 2, deadline),
        )
        for call in calls:
            with suppress(WeightcastError):
                call()


def bodies(data: bytes) -> None:
    """A body is what its route wants, or InvalidInput that names a field."""
    for kind in BODIES:
        try:
            decode_body(data, kind)
        except InvalidInput as error:
            if not error.field:
                raise AssertionError(f"no field is named: {error}") from error


def join_infos(data: bytes) -> None:
    """What an engine is told to join is an address with a key, or an error."""
    with suppress(msgspec.DecodeError, InvalidInput, UnicodeDecodeError, RecursionError):
        # As the engine does it: the body's JSON first, then its fields.
        info = msgspec.convert(msgspec.json.decode(data), known(JoinInfo))
        Deadline(info.timeout_s)


def reports(data: bytes) -> None:
    """A line of a log is a report, which reads back as itself, or InvalidInput."""
    try:
        report = Report.from_json(data)
    except InvalidInput:
        return
    if Report.from_json(report.to_json()) != report and "nan" not in repr(report):
        raise AssertionError(f"{report!r} reads back as another one")


def conversations(data: bytes) -> None:
    """However messages of rounds follow each other: no round goes live that was not approved, none of them twice, and none
    begins while another one is taken back."""
    worker = WorkerRound()
    approved: set[RoundId] = set()
    live: set[RoundId] = set()
    for position in range(0, len(data) - 1, 2):
        action, number = data[position] % 8, data[position + 1]
        id = RoundId(epoch=number >> 4, round=number & 15)
        if action == 0:
            exchanging = worker.phase is RoundPhase.ROLLING_BACK
            if worker.begin(id, Deadline(60) if number % 3 else None) and exchanging:
                raise AssertionError(f"round {id} began in a roll-back")
        elif action == 1:
            worker.staged(id)
        elif action == 2:
            if worker.verified(id, Approval(version=f"{number}-x", content="", digest=number)):
                approved.add(id)
        elif action == 3:
            worker.abort(id, "fuzzed")
        elif action == 4:
            _commit(worker, id, approved, live)
        elif action == 5:
            with suppress(StateError):
                worker.fence(id, "fuzzed", reversible=number % 2 == 0)
        elif action == 6:
            if worker.rolled_back(id):
                live.discard(id)
        elif worker.phase is RoundPhase.ROLLING_BACK and worker.failed(id, "fuzzed"):
            live.discard(id)
        if worker.phase in (RoundPhase.COMMITTED, RoundPhase.ROLLING_BACK) and worker.id not in live:
            raise AssertionError(f"round {worker.id} is live and was never committed")


def _commit(worker: WorkerRound, id: RoundId, approved: set[RoundId], live: set[RoundId]) -> None:
    if worker.id != id or worker.phase is not RoundPhase.VERIFIED:
        return  # it would wait for an approval, by its deadline
    worker.wait_for_approval(id, Deadline(0.1))
    if id not in approved or id in live:
        raise AssertionError(f"round {id} was committed: approved {id in approved}, live {id in live}")
    if worker.committed(id):
        live.add(id)


TARGETS: dict[str, Target] = {
    target.__name__: target
    for target in (
        frames,
        pieces,
        setups,
        landings,
        offers,
        changes,
        callers,
        headers,
        ranks,
        answers,
        bodies,
        join_infos,
        reports,
        conversations,
    )
}


def seeds(target: str) -> list[bytes]:
    """Good inputs to start from."""
    kinds = {"frames": Message, "setups": Setup, "landings": Landings}
    if target in kinds:
        return [encode(message) for message in messages() if isinstance(message, kinds[target])]
    if target == "ranks":
        failed = RoundFailed("m", causes={"e": PeerLost("gone", engine="e")}, serving={"e": "3-ab"}, dirty=("f",))
        return [
            encode_body(Enter(what="publish", timeout_s=1.5)),
            encode_body(Survey()),
            encode_body(Pair(pairs=(1,), transport="shm", copies=CopyColumns.of((), MANIFEST), bucket_nbytes=4096)),
            encode_body(Finish.failed(failed)),
            encode_body(RankReply(error=ErrorForm.of(failed))),
            encode_body(RankReply(manifest=MANIFEST, layout=TABLE, offers=(b"x",), value=2**63)),
        ]
    if target == "answers":
        return [
            b'\x00{"world_size": 2}',
            b'\x00{"phases": {"pause": 0.1, "apply": 1e-3, "resume": 0}}',
            b'\x00{"weight_version": "3-ab", "digest": "ff", "dirty": false, "ready": true}',
            b'\x01{"error": {"type": "StateError", "message": "m", "detail": {"kind": "StateError", "message": "m"}}}',
            b"\x02not json",
            b"\x00" + b"[" * 5000,
        ]
    if target == "offers":
        tcp = TcpOffer(address="127.0.0.1", port=1, secret=b"s" * 32, bucket_nbytes=4096, lanes=2, plan="00")
        return [
            msgspec.msgpack.encode(tcp),
            msgspec.msgpack.encode(ShmOffer(arena=None, spans=(), gaps_are_zero=True)),
        ]
    if target == "changes":
        steps = ({3: 1, 290: 255}, {7: 9, 770: 200}, dict.fromkeys(range(600), 1))
        return [_encoded(step) for step in steps]
    if target == "headers":
        text = b'{"w":{"dtype":"F32","shape":[2,1],"data_offsets":[0,8]},"b":{"dtype":"U8","shape":[1],"data_offsets":[8,9]}}'
        return [len(text).to_bytes(8, "little") + text + bytes(9)]
    if target == "pieces":
        several = (b"\x01" + (9).to_bytes(8, "big") + b"hello", b"\x00four")
        return [b"".join(bytes([len(piece)]) + piece for piece in some) for some in (several, cut(b"hello"))]
    if target == "callers":
        return [b"wc-pair3\x00" + bytes(32) + bytes(32)]
    if target == "bodies":
        return [
            b'{"init_info": {"address": "tcp://127.0.0.1:1"}}',
            b'{"epoch": 1, "round": 2, "version": "3-ab", "pause": "keep", "timeout_s": 1.5}',
            b'{"prompt": [1, 2], "max_tokens": 3, "temperature": 0.5, "stop": ["x"], "stream": true}',
            b'{"messages": [{"role": "user", "content": "x"}], "n": 2, "logprobs": true}',
        ]
    if target == "join_infos":
        key = "rq:rM>}U?@Lns47E1%kR.o@n%FcmmsL/@{H8]yf7"
        return [f'{{"address": "tcp://h:1", "public_key": "{key}", "ticket": "t", "engine": "e"}}'.encode()]
    if target == "reports":
        report = Report(
            version="1-a", number=1, epoch=1, round=1, digest="0", mode="staged", nbytes=1, total_s=0.1,
            outcome="committed",
        )  # fmt: skip
        return [report.to_json().encode()]
    return [b"\x00\x12\x01\x12\x02\x12\x04\x12\x05\x12\x00\x13\x06\x12\x00\x13", b""]


def _encoded(step: dict[int, int]) -> bytes:
    """What changes when these bytes of an image of zeros become others."""
    image = np.zeros(FORM.nbytes, np.uint8)
    image[list(step)] = list(step.values())
    values = [image[stretch.offset : stretch.offset + stretch.nbytes] for stretch in FORM.stretches]
    return encode_changes(FORM, find(FORM, np.zeros_like(image), values)) or b""


def messages() -> list[Message]:
    """One message of each kind."""
    facts = Facts(host="h", pid=1, device="cpu")
    return [
        Heartbeat(),
        Bye(reason="done", settled=True),
        Refused(error=ErrorForm(kind="AuthError", message="no")),
        Hello(
            ticket="t", engine="e", rank=0, world_size=2, facts=facts, version="3-ab", digest="", dirty=False, highest=3
        ),
        Welcome(session="s", manifest=MANIFEST, mode="auto", shadows=1, keep=()),
        Landings(layout=TABLE, mode="staged", shadow_nbytes=512, shadow="cpu"),
        Setup(
            epoch=1,
            holdings=compile_plan(MANIFEST, {0: LAYOUT}, LAYOUT).holdings,
            offers=(Offer(rank=0, transport="shm", data=b"\x00"),),
            timeout_s=1.5,
        ),
        Ready(epoch=1, plan_digest="00"),
        Begin(epoch=1, round=2, base="3-ab", changes=True, timeout_s=2.0),
        Filled(epoch=1, round=2, window=3),
        LetGo(epoch=3),
        Read(epoch=1, round=2, window=3),
        Staged(epoch=1, round=2, digest=2**64 - 1, digested="changed", nbytes=5, transfer_s=0.1, digest_s=0.1),
        Verified(epoch=1, round=2, version="4-cd", content="ff", digest=2**63),
        Committed(epoch=1, round=2, digest=1, digested="all", nbytes=0, transfer_s=0.0, apply_s=0.1, digest_s=0.1),
        Abort(epoch=1, round=2, reason="r"),
        Failed(epoch=1, round=2, error=ErrorForm(kind="PeerLost", message="m", hint="h", phase="transfer"), dirty=True),
        RankOrder(call=3, number=17, body=b"\x81\xff"),
        RankAnswer(number=17, body=b"\x00", failed=True),
    ]


def timed(target: Target, limit_s: float = 1.0) -> Target:
    """The target, which must also be quick: a few bytes that keep a side busy are a way to stop it. The processor's time counts,
    as a machine with other work may stand still for longer."""

    def check(data: bytes) -> None:
        start = time.process_time()
        target(data)
        seconds = time.process_time() - start
        if seconds > limit_s:
            raise AssertionError(f"{len(data)} bytes took {seconds:.1f} s")

    return check

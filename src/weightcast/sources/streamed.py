"""StreamSource: what a user gives who has no tensors that stay, but an iterator of them, anew for each round.

A *pass* is one reading of the stream. The first pass, or ``metadata``, fixes names, element types and shapes, and the order; each later
pass has to agree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from weightcast.errors import InvalidInput, StateError, Unsupported
from weightcast.manifest import TensorSpec
from weightcast.manifest.dtypes import dtype_of, name_of
from weightcast.manifest.names import number_of
from weightcast.sources.shards import check_dense, is_distributed

Stream = Iterable[tuple[str, torch.Tensor]]
"""Names and whole tensors. A tensor may be overwritten or freed once the iterator goes on."""
DEFAULT_WINDOW_NBYTES = 2**30
AGAIN_HINT = "Call connect() to have the stream's form taken anew, from a pass that is read for that"
GATHER_HINT = "Yield whole tensors: full_tensor(), which all ranks call"


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """What may not change between passes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{name_of(self.dtype)} {self.shape}"


class StreamSource:
    """An iterator of names and tensors that is made anew for each round, and how it is read.

    Args:
        make: a function without arguments that returns the iterator; or an object that can be iterated again and again, such as vLLM's
            WeightSource. None: each round's iterator is given to ``publish``.
        metadata: names, element types and shapes of all tensors in the order of the stream, as triples or as objects with ``name``,
            ``dtype`` and ``shape``. None: what ``make.metadata()`` says where there is such a method; otherwise the stream is read once, when the
            Publisher is made, for nothing but its form.
        window_nbytes: the most memory that is kept of the stream, at ``device``. The stream is cut into windows of a quarter of it,
            of which some are filled while others travel.
        device: where windows lie. None: the GPU that the tensors of the first pass are on, or the current GPU where the form is known
            without a pass and this process uses CUDA; otherwise the CPU.
    """

    def __init__(
        self,
        make: Callable[[], Stream] | Stream | None = None,
        *,
        metadata: Iterable[Any] | None = None,
        window_nbytes: int = DEFAULT_WINDOW_NBYTES,
        device: torch.device | str | None = None,
    ) -> None:
        if make is not None and not callable(make):
            _refuse_spent(make)
        if make is None and metadata is None:
            raise InvalidInput("a stream that publish() is given needs its form before", field="metadata")
        self._make = make
        self._metadata = metadata
        self.window_nbytes = window_nbytes
        self._device = None if device is None else _with_index(torch.device(device))

    @property
    def is_given(self) -> bool:
        """Whether each round's iterator has to be given to ``publish``."""
        return self._make is None

    def new_pass(self) -> Stream:
        """Return the iterator of one round."""
        if self._make is None:
            raise StateError("there is no stream to read", hint="Give it to the call: publish(stream)")
        return self._make() if callable(self._make) else self._make

    def form(self) -> tuple[list[Form], torch.device]:
        """Return what every pass yields, in this order, and where windows lie. Reads the stream once unless the form is known."""
        told = self._metadata if self._metadata is not None else _told_by(self._make)
        if told is not None:
            return [_form_told(each) for each in told], self._device or _device_in_use()
        forms, devices = [], set()
        with torch.no_grad():
            for name, tensor in Pass(self.new_pass()):
                forms.append(Form(name=name, dtype=tensor.dtype, shape=tuple(tensor.shape)))
                devices.add(tensor.device)
        return forms, self._device or _device_of(devices)


class Modes:
    """The modes of autograd in which an iterator runs: the caller's, changed by those blocks of the iterator's own that are open at a
    yield. In a plain for loop such an open block would hold in the iterator's next step, too."""

    def __init__(self) -> None:
        self._note()

    def _note(self) -> None:
        self._is_inference, self._has_grad = torch.is_inference_mode_enabled(), torch.is_grad_enabled()

    @contextmanager
    def restored(self) -> Iterator[None]:
        with torch.inference_mode(self._is_inference), torch.set_grad_enabled(self._has_grad):
            yield
            self._note()


class Pass:
    """One reading of a stream. The pass closes its iterator when the reading ends, however the reading ends."""

    def __init__(self, stream: Stream, modes: Modes | None = None) -> None:
        self._modes = modes or Modes()
        with self._modes.restored():
            self._iterator = iter(stream)
        self.is_over = False
        """The iterator has ended, or raised: it cannot go on."""

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        while (item := self._next()) is not None:
            yield _checked(item)

    def _next(self) -> Any:
        try:
            with self._modes.restored():
                return next(self._iterator)
        except StopIteration:
            self.is_over = True
            return None
        except BaseException:
            self.is_over = True
            raise

    def exhaust(self) -> None:
        """Read on to the end and keep nothing, because other ranks gather with this rank."""
        while not self.is_over:
            self._next()

    def close(self) -> None:
        """Close the iterator where it stands, so that it can clean up."""
        close = getattr(self._iterator, "close", None)
        if close is not None and not self.is_over:
            self.is_over = True
            with self._modes.restored():
                close()


class Expected(NamedTuple):
    """The next tensor of a stream: as the stream yields it, and as it is published."""

    form: Form
    spec: TensorSpec


class Agreement:
    """Compares one pass with the first pass. Each pass has an Agreement of its own."""

    def __init__(self, expected: Sequence[Expected]) -> None:
        self._expected = expected
        self._known = {each.form.name: at for at, each in enumerate(expected)}
        self._came = 0

    def next(self, name: str, tensor: torch.Tensor) -> Expected:
        """Return the tensor that has to come next. StateError names the tensor that came in its place, or how the tensor differs."""
        if self._came == len(self._expected) or self._expected[self._came].form.name != name:
            raise self._stranger(name)
        due = self._expected[self._came]
        now = Form(name=name, dtype=tensor.dtype, shape=tuple(tensor.shape))
        if now != due.form:
            raise StateError(f"{name!r} was {due.form} in the first pass and is {now}", hint=AGAIN_HINT)
        self._came += 1
        return due

    def _stranger(self, name: str) -> StateError:
        at = self._known.get(name)
        if at is None:
            return StateError(f"the stream yields {name!r}, which the first pass did not have", hint=AGAIN_HINT)
        if at < self._came:
            return StateError(f"the stream yields {name!r} twice")
        due = self._expected[self._came].form.name
        return StateError(f"the stream yields {name!r} where {due!r} was due: its order is that of the first pass")

    def end(self) -> None:
        """Note that the stream ended. StateError names the first tensor that did not come."""
        if self._came < len(self._expected):
            due = self._expected[self._came].form.name
            text = f"the stream ended before {due!r}, after {self._came} of {number_of(len(self._expected), 'tensor')}"
            raise StateError(text, hint=AGAIN_HINT)


def _checked(item: Any) -> tuple[str, torch.Tensor]:
    try:
        name, tensor = item
    except (TypeError, ValueError):
        name, tensor = None, None
    if not isinstance(name, str):
        raise InvalidInput(f"a stream yields pairs of name and tensor, not a {type(item).__name__}", field="source")
    if not isinstance(tensor, torch.Tensor):
        raise InvalidInput(
            f"the stream yields no torch tensor for {name!r}, but a {type(tensor).__name__}",
            field="source",
            hint="The rank that publishes has to hold every tensor whole; others may yield what they like",
        )
    if is_distributed(tensor):
        raise Unsupported(f"{name!r} is a DTensor, of which this rank has a part only", hint=GATHER_HINT)
    check_dense({name: tensor})
    return name, tensor


def _refuse_spent(stream: object) -> None:
    """Raise InvalidInput for what can be read once, or not at all."""
    if not isinstance(stream, Iterable) or isinstance(stream, str | bytes):
        raise InvalidInput(f"a {type(stream).__name__} is no stream of names and tensors", field="source")
    if iter(stream) is stream:
        raise InvalidInput(
            f"a {type(stream).__name__} can be read once, and every round reads it",
            field="source",
            hint="Give the function that makes it, StreamSource(function)\nOr give metadata= here, and the iterator to publish(stream)",
        )


def _told_by(make: object) -> Iterable[Any] | None:
    metadata = getattr(make, "metadata", None)
    return metadata() if callable(metadata) else None


def _form_told(told: Any) -> Form:
    try:
        name, dtype, shape = (told.name, told.dtype, told.shape) if hasattr(told, "shape") else told
        dtype = dtype_of(dtype) if isinstance(dtype, str) else dtype
        form = Form(name=name, dtype=dtype, shape=tuple(map(int, shape)))
        name_of(dtype)
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise InvalidInput(
            f"metadata has name, dtype and shape for each tensor, not {told!r} ({error})", field="metadata"
        ) from None
    return form


def _with_index(device: torch.device) -> torch.device:
    """The device by number: the current GPU may be another one by the time that windows are filled."""
    return torch.device("cuda", torch.cuda.current_device()) if device == torch.device("cuda") else device


def _device_in_use() -> torch.device:
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _device_of(devices: set[torch.device]) -> torch.device:
    """The one GPU among them, or the CPU."""
    gpus = sorted({device for device in devices if device.type != "cpu"}, key=str)
    if len(gpus) > 1:
        raise Unsupported(
            f"a stream whose tensors lie on several GPUs: {', '.join(map(str, gpus))}",
            hint="Give device=, to which every tensor is copied",
        )
    return gpus[0] if gpus else torch.device("cpu")

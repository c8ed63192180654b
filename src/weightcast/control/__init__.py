"""The control channel: one coordinator (trainer rank 0), many members, over CURVE-secured ZeroMQ.

Load-bearing properties:

- Encrypted and authenticated: the coordinator's public key travels in ``init_info``; a member proves itself by a one-time,
  short-lived ticket in its first message. A peer without either gets nothing, and learns nothing.
- One thread per side owns the socket; everything else talks to it through queues. Handlers run on that thread, so they
  only note what came and never block.
- A side that is silent for ``silence_s`` is lost. ZeroMQ's I/O threads ask and answer, so a side that is busy is not silent, whatever
  its Python does; one that is stopped, or whose host is gone, is. Clock: monotonic.
- A frame that cannot be understood is logged and dropped; it ends nothing.
"""

from weightcast.control.coordinator import Coordinator, Member
from weightcast.control.link import ControlLink, JoinInfo

__all__ = ["ControlLink", "Coordinator", "JoinInfo", "Member"]

"""tls: tcp whose connections are encrypted, for networks on which somebody may listen or change bytes.

Each process makes one certificate for itself, valid for nothing else. It reaches the worker, with its private key, in the offer, over
the encrypted control channel; either side accepts exactly that certificate from the other (TLS 1.3, mutual). Never chosen by
itself: ask for it by ``transport="tls"``. Certificates are made by the package ``cryptography`` (``pip install 'weightcast[tls]'``).
"""

from __future__ import annotations

from weightcast.transports.base import Facts
from weightcast.transports.certificates import own_identity
from weightcast.transports.tcp import TcpTransport


class TlsTransport(TcpTransport):
    """CPU memory over TLS; pushes."""

    name = "tls"
    preference = 30

    @classmethod
    def suits(cls, trainer: Facts, worker: Facts) -> bool:
        """Encryption has to be asked for."""
        return False

    def identity(self) -> bytes:
        return own_identity()

"""Certificates of the transport tls: one for each process, made by that process, and accepted by nobody but its peers in a round."""

from __future__ import annotations

import datetime
import os
import ssl
from functools import cache

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from weightcast.errors import ProtocolError

_NAME = "weightcast pair"
_VALID = datetime.timedelta(days=3650)
"""Clocks of hosts differ, and a trainer may run for long; the key is forgotten with the process."""


@cache
def own_identity() -> bytes:
    """This process's certificate and private key, as PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, _NAME)])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _VALID)
        .not_valid_after(now + _VALID)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return bytes(certificate.public_bytes(serialization.Encoding.PEM) + private)


def pinned(identity: bytes, *, server: bool) -> ssl.SSLContext:
    """A context that shows this certificate and accepts no other. ProtocolError where it is none."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    # The library reads keys from files only; this one has no name and no disk below it.
    file = os.memfd_create("weightcast-tls", os.MFD_CLOEXEC)
    try:
        os.write(file, identity)
        context.load_cert_chain(f"/proc/self/fd/{file}")
        context.load_verify_locations(cadata=identity.decode("ascii"))
    except (ssl.SSLError, UnicodeDecodeError) as error:
        raise ProtocolError(f"the offer's certificate cannot be used: {error}") from None
    finally:
        os.close(file)
    return context

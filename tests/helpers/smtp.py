"""A real SMTP server that keeps what it receives, may demand TLS and a login, or may never answer."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import datetime
import ipaddress
import ssl
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Sink:
    """The server.

    Attributes:
        port: its port on the loopback interface.
        messages: what it received.
        recipients: of each message.
        logins: user names and passwords.
        encrypted: of each message, whether the connection was.
    """

    port: int = 0
    messages: list[str] = field(default_factory=list)
    recipients: list[list[str]] = field(default_factory=list)
    logins: list[tuple[str, str]] = field(default_factory=list)
    encrypted: list[bool] = field(default_factory=list)


@contextlib.contextmanager
def smtp_sink(*, certificate: Path | None = None, silent: bool = False, refuse: bool = False) -> Iterator[Sink]:
    """Serves until the end of the block.

    Args:
        certificate: PEM file of certificate and key for STARTTLS; without it there is none.
        silent: accept connections and say nothing.
        refuse: refuse every recipient.
    """
    sink, loop, ready = Sink(), asyncio.new_event_loop(), threading.Event()
    context = None
    if certificate is not None:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(certificate)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            if silent:
                await reader.read()
                return
            await _session(sink, reader, writer, context, refuse)
        writer.close()

    async def begin() -> asyncio.Server:
        return await asyncio.start_server(serve, "127.0.0.1", 0)

    def run() -> None:
        asyncio.set_event_loop(loop)
        server = loop.run_until_complete(begin())
        sink.port = server.sockets[0].getsockname()[1]
        ready.set()
        loop.run_forever()
        for task in asyncio.all_tasks(loop):
            task.cancel()
        server.close()
        loop.run_until_complete(loop.shutdown_asyncgens())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    ready.wait()
    try:
        yield sink
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(timeout=60)


async def _session(
    sink: Sink, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, context: ssl.SSLContext | None, refuse: bool
) -> None:
    async def say(*lines: str) -> None:
        writer.write("".join(f"{line}\r\n" for line in lines).encode())
        await writer.drain()

    encrypted, recipients = False, []
    await say("220 sink")
    while line := (await reader.readline()).decode().strip():
        verb, _, rest = line.partition(" ")
        verb = verb.upper()
        if verb == "EHLO":
            offers = [
                "250-sink",
                *(["250-STARTTLS"] if context and not encrypted else []),
                *(["250-AUTH PLAIN"] if encrypted else []),
            ]
            await say(*offers, "250 8BITMIME")
        elif verb == "STARTTLS" and context:
            await say("220 begin")
            await writer.start_tls(context)
            encrypted = True
        elif verb == "AUTH":
            _, user, password = base64.b64decode(rest.split()[-1]).decode().split("\0")
            sink.logins.append((user, password))
            await say("235 welcome" if password == "right" else "535 wrong")
        elif verb == "RCPT":
            recipients.append(rest.partition("<")[2].partition(">")[0])
            await say("550 not here" if refuse else "250 ok")
        elif verb == "DATA":
            await say("354 go on")
            body = (await reader.readuntil(b"\r\n.\r\n")).decode()
            sink.messages.append(body)
            sink.recipients.append(recipients)
            sink.encrypted.append(encrypted)
            recipients = []
            await say("250 kept")
        elif verb == "QUIT":
            await say("221 bye")
            return
        else:
            await say("250 ok")


def make_certificate(file: Path) -> Path:
    """Writes a certificate for 127.0.0.1, signed by itself, and its key to a PEM file."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    alternative = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=3650))
        .add_extension(alternative, critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    secret = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    file.write_bytes(made.public_bytes(serialization.Encoding.PEM) + secret)
    return file

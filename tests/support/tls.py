"""TLS in front of the tests' server, whose binary is built without it.

The tests are about the client's side, which is real.
"""

from __future__ import annotations

import asyncio
import ssl
import subprocess
import threading
from pathlib import Path


class Certificates:
    """A CA with certificates for a server on localhost and for a client, made by openssl."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ca = self._ca("ca")
        self.other_ca = self._ca("other")
        self._signed("server", "subjectAltName=DNS:localhost")
        self._signed("client", "keyUsage=digitalSignature")

    def path(self, name: str) -> Path:
        return self.folder / name

    def _ca(self, name: str) -> Path:
        self._openssl(
            "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2",
            "-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.pem",
            "-addext", "keyUsage=critical,keyCertSign,cRLSign",
        )  # fmt: skip
        return self.path(f"{name}.pem")

    def _signed(self, name: str, extension: str) -> None:
        self._openssl(
            "req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", f"/CN={name}",
            "-keyout", f"{name}.key", "-out", f"{name}.csr",
        )  # fmt: skip
        self.path(f"{name}.ext").write_text(extension)
        self._openssl(
            "x509", "-req", "-days", "2", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial",
            "-out", f"{name}.pem", "-extfile", f"{name}.ext",
        )  # fmt: skip

    def _openssl(self, *args: str) -> None:
        subprocess.run(["openssl", *args], cwd=self.folder, check=True, capture_output=True)


class TlsFront:
    """Accepts TLS on 127.0.0.1 and forwards to a unix socket. Clients need a certificate of the CA."""

    def __init__(self, socket: Path, certificates: Certificates) -> None:
        self._socket = socket
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(certificates.path("server.pem"), certificates.path("server.key"))
        self._context.load_verify_locations(certificates.ca)
        self._context.verify_mode = ssl.CERT_REQUIRED
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self.port = 0

    def __enter__(self) -> TlsFront:
        self._thread.start()
        starting = asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self._context)
        self._server = asyncio.run_coroutine_threadsafe(starting, self._loop).result(10)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _close(self) -> None:
        self._server.close()
        this_task = asyncio.current_task()
        tasks = [task for task in asyncio.all_tasks() if task is not this_task]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        to_read, to_write = await asyncio.open_unix_connection(str(self._socket))
        try:
            await asyncio.wait(
                [asyncio.create_task(_pass(reader, to_write)), asyncio.create_task(_pass(to_read, writer))],
                return_when=asyncio.FIRST_COMPLETED,
            )
        finally:
            to_write.close()
            writer.close()


async def _pass(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
    except OSError:
        return

"""The listener: whoever connects is answered, however many come at once."""

import asyncio
import resource
import socket

import pytest
import uvloop

from app.listener import Listener

DEADLINE_S = 60
CONNECTIONS = 300


class Greeting(asyncio.Protocol):
    """Says hello and hangs up."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client has connected."""
        assert hasattr(transport, "write")
        transport.write(b"hello")
        transport.close()


async def greeting(address: tuple[str, int]) -> bytes:
    """What a client is told."""
    reader, writer = await asyncio.open_connection(*address)
    text = await reader.read()
    writer.close()
    return text


def listening() -> socket.socket:
    """A listening socket on a free port."""
    return socket.create_server(("127.0.0.1", 0), backlog=CONNECTIONS)


def test_a_crowd() -> None:
    """All are greeted, also by a loop that accepts one connection a turn by itself."""

    async def scenario() -> None:
        with listening() as door:
            listener = Listener(door, Greeting)
            async with asyncio.timeout(DEADLINE_S):
                texts = await asyncio.gather(
                    *(greeting(door.getsockname()) for _ in range(CONNECTIONS))
                )
                listener.close()
                await listener.wait_closed()
        assert texts == [b"hello"] * CONNECTIONS

    uvloop.run(scenario())


def test_no_descriptor_left(caplog: pytest.LogCaptureFixture) -> None:
    """When the system has none, the listener pauses and goes on; nobody who waits is lost."""

    async def scenario() -> None:
        with listening() as door:
            listener = Listener(door, Greeting)
            client = socket.create_connection(door.getsockname())
            client.setblocking(False)
            soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            loop = asyncio.get_running_loop()
            resource.setrlimit(resource.RLIMIT_NOFILE, (client.fileno(), hard))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            async with asyncio.timeout(DEADLINE_S):
                assert await loop.sock_recv(client, 16) == b"hello"
            client.close()
            listener.close()

    asyncio.run(scenario())

    assert "no connection can be accepted" in caplog.text

"""One connection to a daemon, made again when it is hung up on, and frames of one kind without end. A
process of its own, so that it does not hold up the honest clients of a test. Called as:
flood.py HOST:PORT KIND FILE; FILE has the bytes of this connection, those of all, and how often it
was hung up on."""

import os
import socket
import struct
import subprocess
import sys
import tempfile
import time

DATA, HEADERS, PRIORITY, RST, SETTINGS, PING, WINDOW, CONTINUATION, UNKNOWN = 0, 1, 2, 3, 4, 6, 8, 9, 0xfa


def frame(kind, stream=0, payload=b"", flags=0):
    return struct.pack(">I", len(payload))[1:] + bytes((kind, flags)) + struct.pack(">I", stream) + payload


# A request's headers up to where they can go on, in HPACK's plainest form: ":method" POST, ":scheme"
# http, ":path" /x.
OPEN = frame(HEADERS, 1, b"\x83\x86\x04\x02/x")
GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(SETTINGS)
KINDS = {
    "unknown frames": (b"", frame(UNKNOWN)),
    "settings": (b"", frame(SETTINGS)),
    "pings": (b"", frame(PING, payload=bytes(8))),
    "priorities": (b"", frame(PRIORITY, 1, bytes(5))),
    "empty data": (frame(HEADERS, 1, b"\x83\x86\x04\x02/x", flags=4), frame(DATA, 1)),
    "window updates": (b"", frame(WINDOW, 0, struct.pack(">I", 0))),
    "resets": (b"", frame(RST, 1, bytes(4))),
    "headers without end": (OPEN, frame(CONTINUATION, 1)),
}


def run(address, kind, told):
    begins, frames = KINDS[kind]
    frames *= 900000 // len(frames)
    total = ended = 0
    while True:
        try:
            with socket.create_connection(address.split(":"), timeout=20) as other:
                other.sendall(GREETING + begins)
                sent = 0
                while True:
                    other.sendall(frames)
                    sent += len(frames)
                    total += len(frames)
                    tell(told, sent, total, ended)
        except OSError:
            ended += 1
            tell(told, 0, total, ended)
            time.sleep(0.02)


def tell(told, *numbers):
    told.seek(0)
    told.write("".join(f"{n:20}" for n in numbers))
    told.flush()


class Flood:
    """As a process beside a test."""

    def __init__(self, daemon, kind):
        self.told = tempfile.NamedTemporaryFile("r", dir=os.path.dirname(daemon.log))
        self.process = subprocess.Popen([sys.executable, "-S", __file__, daemon.address, kind,
                                         self.told.name])

    def count(self):
        """(bytes of this connection, of all, times hung up on)."""
        self.told.seek(0)
        return [int(n) for n in self.told.read().split()] or [0, 0, 0]

    def stop(self):
        self.process.kill()
        self.process.wait()
        self.told.close()


if __name__ == "__main__":
    with open(sys.argv[3], "w") as told:
        run(sys.argv[1], sys.argv[2], told)

"""An HTTP/2 client that can be bent: it speaks gRPC well, but may stop anywhere, say too much, or
never read. Frames and header compression are the h2 package's; every decision is the test's.
"""

import functools
import select
import socket
import struct
import time

import h2.config
import h2.connection
import h2.events
import h2.settings

FRAME = 16384
AT_ONCE = 4 << 20  # bytes that a send hands to the socket before it looks at what came


class Stream:
    """What the peer said on one stream."""

    def __init__(self):
        self.data, self.headers, self.ended, self.reset = bytearray(), {}, False, None

    @property
    def over(self):
        return self.ended or self.reset is not None

    def status(self):
        """(attn-status or None, grpc-status or None, sentence)."""
        own = self.headers.get("attn-status")
        code = self.headers.get("grpc-status")
        return (None if own is None else int(own), None if code is None else int(code),
                self.headers.get("grpc-message", ""))


class Bent:
    """One connection. reads=False: flow-control windows are never given back."""

    def __init__(self, address, reads=True, window=None):
        host, port = address.rsplit(":", 1)
        self.socket = socket.create_connection((host, int(port)), timeout=10)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.reads, self.streams, self.gone = reads, {}, None
        self.h2 = h2.connection.H2Connection(h2.config.H2Configuration(
            client_side=True, header_encoding="utf-8", validate_outbound_headers=False,
            validate_inbound_headers=False, normalize_outbound_headers=False))
        # Its Huffman code takes time with the square of a header's length.
        self.h2.encoder.encode = functools.partial(self.h2.encoder.encode, huffman=False)
        self.h2.initiate_connection()
        if window is not None:
            self.h2.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: window})
        self.flush()

    def close(self):
        self.socket.close()

    def flush(self):
        data = self.h2.data_to_send()
        try:
            self.socket.sendall(data)
        except OSError as error:
            self.gone = self.gone or str(error)

    def open(self, path, headers=(), timeout="20S"):
        """Begin a call; returns its stream's number."""
        number = self.h2.get_next_available_stream_id()
        self.streams[number] = Stream()
        head = [(":method", "POST"), (":scheme", "http"), (":path", path),
                (":authority", "attnd"), ("content-type", "application/grpc"), ("te", "trailers")]
        if timeout is not None:
            head.append(("grpc-timeout", timeout))
        self.h2.send_headers(number, head + list(headers))
        self.flush()
        return number

    @staticmethod
    def message(body, compressed=0, size=None):
        """A gRPC message, which may lie about its size."""
        return struct.pack(">BI", compressed, len(body) if size is None else size) + body

    def send(self, number, data, end=False, seconds=20):
        """Send data as far as windows let us; returns the bytes sent."""
        at, deadline = 0, time.monotonic() + seconds
        view = memoryview(data)
        while at < len(view) and not self.streams[number].over and self.gone is None:
            room = min(self.h2.local_flow_control_window(number), FRAME, len(view) - at)
            if room > 0:
                self.h2.send_data(number, bytes(view[at:at + room]))
                at += room
                if at % (1 << 20) < FRAME:
                    self.flush()
                    self.pump(0)
            else:
                self.flush()
                if not self.pump(min(1.0, max(0.0, deadline - time.monotonic()))) and \
                        time.monotonic() >= deadline:
                    break
        if end and at == len(view) and not self.streams[number].over:
            self.h2.end_stream(number)
        self.flush()
        return at

    def pump(self, seconds):
        """Take what the peer sent, waiting so long for the first of it; whether anything came."""
        if self.gone is not None or not select.select([self.socket], [], [], seconds)[0]:
            return False
        try:
            data = self.socket.recv(1 << 20)
        except OSError as error:
            self.gone = str(error)
            return False
        if not data:
            self.gone = "closed"
            return False
        try:
            for event in self.h2.receive_data(data):
                self.take(event)
        except h2.exceptions.ProtocolError as error:
            self.gone = self.gone or str(error)
        self.flush()
        return True

    def take(self, event):
        stream = self.streams.get(getattr(event, "stream_id", None))
        if isinstance(event, (h2.events.ResponseReceived, h2.events.TrailersReceived)):
            stream.headers.update(event.headers)
        elif isinstance(event, h2.events.DataReceived):
            stream.data += event.data
            if self.reads:
                self.h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
        elif isinstance(event, h2.events.StreamEnded):
            stream.ended = True
        elif isinstance(event, h2.events.StreamReset):
            stream.reset = int(event.error_code)
        elif isinstance(event, h2.events.ConnectionTerminated):
            self.gone = f"goaway {event.error_code} {event.additional_data}"

    def wait(self, number, seconds):
        """Until the stream is over, or the connection; whether it was in time."""
        end = time.monotonic() + seconds
        while not self.streams[number].over and self.gone is None:
            left = end - time.monotonic()
            if left <= 0:
                return False
            self.pump(left)
        return True

    def messages(self, number):
        """The whole gRPC messages that came on a stream."""
        data, at = bytes(self.streams[number].data), 0
        while at + 5 <= len(data):
            size = struct.unpack(">I", data[at + 1:at + 5])[0]
            if at + 5 + size > len(data):
                return
            yield data[at + 5:at + 5 + size]
            at += 5 + size

"""Bad input and greedy peers, against real processes. Called as: test_hostile.py PATH_OF_ATTND
[unittest arguments]; exits 77 where a package is missing.

    bad_requests.py what is wrong in a message, or around it
    bad_numbers.py  NaN, infinities and what lies near them, in q, k and v
    resources.py    peers that take time, threads, memory, connections
    floods.py       peers that send frames without a pause

After every test the daemons must be alive and right, the KV store's checker content, and memory and
descriptors back to where they were (hostile.py).
"""

import os
import sys
import unittest

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, "..", "wire"))

try:
    import grpc  # noqa: F401
    import grpc_tools  # noqa: F401
    import h2  # noqa: F401
    import numpy  # noqa: F401
except ImportError as missing:
    print(f"skipped: {missing} (deploy/python-env makes an interpreter with all that is needed)")
    sys.exit(77)

import daemons


def main():
    if len(sys.argv) < 2:
        sys.exit("usage: test_hostile.py PATH_OF_ATTND [unittest arguments]")
    daemons.ATTND = os.path.abspath(sys.argv.pop(1))
    import bad_numbers
    import bad_requests
    import floods
    import resources
    globals().update(Requests=bad_requests.Requests, Numbers=bad_numbers.Numbers,
                     Resources=resources.Resources, Connections=resources.Connections,
                     Floods=floods.Floods)
    unittest.main()


if __name__ == "__main__":
    main()

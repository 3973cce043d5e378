#!/usr/bin/env python3
"""Hosts on links: network namespaces whose packets this process carries, at a rate and after a while.

usage: links.py HOSTS MBIT_PER_S MILLISECONDS

Host 0 is the machine itself, the others are the namespaces ranks1, ranks2, ...; their addresses are
10.77.0.0/24 with 100 and their number. MILLISECONDS are those there and back. Prints a line when the
links are there; ends with its standard input.
"""

import fcntl
import heapq
import os
import select
import struct
import subprocess
import sys
import time

TUNSETIFF, TUN, NO_PREFIX = 0x400454CA, 0x0001, 0x1000
# As few packets as can be: a packet costs this process more than its bytes do.
MTU = 32000


def ip(*arguments):
    subprocess.run(("ip", *map(str, arguments)), check=True)


def link(host):
    """The packets of a host."""
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    name = f"ranks-{host}"
    fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH", name.encode(), TUN | NO_PREFIX))
    where = ()
    if host > 0:
        ip("netns", "add", f"ranks{host}")
        ip("link", "set", name, "netns", f"ranks{host}")
        where = ("-n", f"ranks{host}")
        ip(*where, "link", "set", "lo", "up")
    ip(*where, "link", "set", name, "mtu", MTU)
    ip(*where, "addr", "add", f"10.77.0.{100 + host}/24", "dev", name)
    ip(*where, "link", "set", name, "up")
    return device


def main():
    hosts, rate, delay = int(sys.argv[1]), float(sys.argv[2]) * 1e6 / 8, float(sys.argv[3]) / 2e3
    links = [link(host) for host in range(hosts + 1)]
    print("up", flush=True)
    host_of = {device: host for host, device in enumerate(links)}
    # When each host's link is free again, out and in; and what is on its way.
    out, into, going, count = [0.0] * len(links), [0.0] * len(links), [], 0
    while True:
        now = time.monotonic()
        while going and going[0][0] <= now:
            _, _, to, packet = heapq.heappop(going)
            try:
                os.write(links[to], packet)
            except OSError:
                pass  # The host is cut off.
        wait = max(0.0, going[0][0] - time.monotonic()) if going else None
        ready, _, _ = select.select([sys.stdin, *links], [], [], wait)
        if sys.stdin in ready:
            return
        for device in ready:
            host = host_of[device]
            try:
                packet = os.read(device, MTU)
            except OSError:
                continue
            to = packet[19] - 100
            if packet[0] >> 4 != 4 or not 0 <= to < len(links):
                continue
            now, took = time.monotonic(), len(packet) / rate
            out[host] = max(now, out[host]) + took
            into[to] = max(out[host] + delay, into[to] + took)
            count += 1
            heapq.heappush(going, (into[to], count, to, packet))


main()

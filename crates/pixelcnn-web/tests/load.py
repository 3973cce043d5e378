"""Many clients of `pixelcnn serve` at once, good and bad ones.

    load.py PROGRAM [--seconds 60] [--clients 64]

PROGRAM is the built `pixelcnn`. Good clients ask for samples, scores, distributions and archives in turn and
check what they get; bad ones beside them read nothing, send half a request or 100 MB, or go away. Prints
requests a second, times, and the server's memory; fails where an answer is wrong or lost, or memory grows
beyond bounds.
"""

import argparse
import base64
import collections
import json
import pathlib
import random
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

# Of memory, at most: the model three times over, 256 MiB of requests, and what they are worked on with.
MOST = 2 << 30


class Server:
    def __init__(self, program):
        command = [program, "serve", "--port", "0"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        self.link = self.process.stdout.readline().strip()
        self.address = self.link.split("/")[2].split(":")

    def ask(self, path, request):
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.link + path, json.dumps(request).encode(), headers)
        with urllib.request.urlopen(request, timeout=300) as answer:
            return json.load(answer)

    def connect(self):
        return socket.create_connection((self.address[0], int(self.address[1])), timeout=60)

    def memory(self):
        """Resident bytes now, and at most so far."""
        status = pathlib.Path(f"/proc/{self.process.pid}/status").read_text()
        lines = dict(line.split(":", 1) for line in status.splitlines())
        return [int(lines[name].split()[0]) << 10 for name in ("VmRSS", "VmHWM")]


class Clients:
    def __init__(self, server, until):
        self.server, self.until = server, until
        self.lock = threading.Lock()
        self.times = collections.defaultdict(list)
        self.busy = 0
        self.wrong = []
        self.samples = {}

    def good(self, number):
        random_ = random.Random(number)
        while time.monotonic() < self.until:
            kind = random_.choice(["sample", "sample", "score", "distribution", "compress"])
            start = time.monotonic()
            try:
                getattr(self, kind)(random_)
            except urllib.error.HTTPError as error:
                if error.code != 503:
                    self.fail(f"{kind}: {error.code} {error.read()[:200]}")
                with self.lock:
                    self.busy += 1
                time.sleep(1)
                continue
            except Exception as error:  # Whatever it is, an answer was lost.
                self.fail(f"{kind}: {error!r}")
                continue
            with self.lock:
                self.times[kind].append(time.monotonic() - start)

    def fail(self, what):
        with self.lock:
            self.wrong.append(what)

    def sample(self, random_):
        seed = random_.randrange(8)
        answer = self.server.ask("v1/sample", {"count": 2, "seed": seed, "format": "levels"})
        with self.lock:
            first = self.samples.setdefault(seed, answer["images"])
        if first != answer["images"]:
            self.fail(f"seed {seed} gave other images than before")

    def picture(self, random_):
        side = random_.choice([8, 32])
        return {"levels": [[[random_.randrange(256)] * 3 for _ in range(side)] for _ in range(side)]}

    def score(self, random_):
        answer = self.server.ask("v1/score", {"images": [self.picture(random_) for _ in range(3)], "maps": True})
        for score in answer["scores"]:
            bits = sum(map(sum, score["bits_per_pixel"])) / (3 * score["size"][0] * score["size"][1])
            if abs(bits - score["bits_per_dim"]) > 1e-3 * bits:
                self.fail(f"score {score['bits_per_dim']}, map {bits}")

    def distribution(self, random_):
        answer = self.server.ask("v1/distribution", {"image": self.picture(random_), "pixel": [5, 3]})
        if any(abs(sum(channel) - 1) > 1e-3 for channel in answer["probabilities"]):
            self.fail("probabilities do not add up")

    def compress(self, random_):
        data = base64.b64encode(random_.randbytes(1000)).decode()
        answer = self.server.ask("v1/compress", {"files": [{"name": "file", "data": data}]})
        back = self.server.ask("v1/decompress", {"archive": answer["archive"]})
        if back["files"][0]["data"] != data:
            self.fail("a file came back changed")

    def bad(self, number):
        random_ = random.Random(number)
        body = json.dumps({"count": 16, "stream": True, "format": "levels"}).encode()
        head = "POST /v1/sample HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: "
        while time.monotonic() < self.until:
            kind = random_.choice(["unread", "half", "large", "gone"])
            try:
                with self.server.connect() as connection:
                    if kind == "half":
                        connection.sendall(f"{head}1000\r\n\r\n{{".encode())
                        time.sleep(2)
                    elif kind == "large":
                        connection.sendall(f"{head}100000000\r\n\r\n".encode())
                        for _ in range(100):
                            connection.sendall(b" " * 1_000_000)
                    else:
                        connection.sendall(f"{head}{len(body)}\r\n\r\n".encode() + body)
                        time.sleep(5 if kind == "unread" else 0.2)
            except OSError:
                pass  # The server hung up, as it should.


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--clients", type=int, default=64)
    arguments = parser.parse_args()
    server = Server(arguments.program)
    try:
        clients = Clients(server, time.monotonic() + arguments.seconds)
        threads = [threading.Thread(target=clients.good, args=[i]) for i in range(arguments.clients)]
        threads += [threading.Thread(target=clients.bad, args=[i]) for i in range(arguments.clients // 4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        total = sum(map(len, clients.times.values()))
        print(f"{arguments.clients} clients and {arguments.clients // 4} bad ones, {arguments.seconds:.0f} s: "
              f"{total} requests answered, {clients.busy} told to come back later")
        for kind, times in sorted(clients.times.items()):
            times.sort()
            print(f"  {kind:13} {len(times):5}   median {times[len(times) // 2]:5.2f} s   "
                  f"99 % {times[int(len(times) * 0.99)]:5.2f} s")
        # What bad clients asked for goes away with them.
        deadline = time.monotonic() + 30
        while True:
            with urllib.request.urlopen(server.link + "metrics") as answer:
                if "pixelcnn_requests_running 0\n" in answer.read().decode():
                    break
            assert time.monotonic() < deadline, "it is still at work for nobody"
            time.sleep(0.2)
        now, most = server.memory()
        print(f"memory: {now >> 20} MiB, at most {most >> 20} MiB")
        for wrong in clients.wrong[:10]:
            print("WRONG:", wrong)
        assert not clients.wrong and total > arguments.clients and most < MOST
        server.process.terminate()
        assert server.process.wait(timeout=20) == 0
    finally:
        server.process.kill()


if __name__ == "__main__":
    sys.exit(main())

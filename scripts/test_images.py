#!/usr/bin/env python3
"""Build the images of the Dockerfile without Docker, and run what docker-compose.yaml describes.

    make test-images        as root, on Debian or Ubuntu

Buildah builds all images on a base that debootstrap makes. Then each service of the profile
"kamailio" runs in its image's files, with a network namespace and an address of its own, and with
the user, command, environment and volumes that image and compose file say; the tester runs all
scenarios, and the agent is stopped by SIGTERM with calls running and started again on its volume.
Then the profile "cluster" runs, with Debian's Redis and nginx in place of a registry's images.

Everything is in one temporary folder and in namespaces that end with this program. Exit status:
0 all is right, or this machine can't do it, which is said; 1 something is wrong.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml
from demo import ACCOUNTS, TRANSACTIONS, graphql
from demo_cluster import CALLS, packets

ROOT = Path(__file__).resolve().parent.parent
# What is started; the tester is run as `make docker-test` does.
PROFILE = "kamailio"
PROXY = "kamailio:5060"
CLUSTER = ("redis", "agent-1", "agent-2", "balancer")
MIRROR = "http://deb.debian.org/debian"
PACKAGES = "ca-certificates,python3,python3-venv,python-is-python3"
# Debian's programs as the images of a registry have them: Redis drops root, works in /data and is
# built without protected mode; nginx begins as root and writes its log to that of the container.
INSTALL = "RUN apt-get update -qq && apt-get install -qq -y --no-install-recommends"
STAND_INS = {
    "redis": f"""{INSTALL} redis-server && install -d -o redis -g redis /data
WORKDIR /data
USER redis
ENTRYPOINT ["sh", "-c", "exec \\"$@\\" --protected-mode no", "sh"]
""",
    "balancer": f"""{INSTALL} nginx-light libnginx-mod-stream
RUN ln -sf /dev/stderr /var/log/nginx/error.log
CMD ["nginx", "-g", "daemon off;"]
""",
}
# Where a service without a health check listens.
PORTS = {"redis": ("tcp", 6379), "balancer": ("tcp", 9060)}
# Addresses for documentation, in namespaces only.
NETWORK = "192.0.2"
PATIENCE = 30.0  # seconds for anything that has to happen


def said(*command: str | Path) -> str:
    """What a command prints; its complaints are shown. Raises SystemExit where it fails."""
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"FAILED, status {done.returncode}: {' '.join(map(str, command))}\n{done.stdout}")
    return str(done.stdout)


def wait_until(condition: Callable[[], object], what: str) -> None:
    """Poll until it holds. Raises SystemExit."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            sys.exit(f"FAILED, not in {PATIENCE:g} s: {what}")
        time.sleep(0.05)


@contextlib.contextmanager
def step(name: str) -> Iterator[None]:
    """Print how long something took."""
    started = time.monotonic()
    yield
    print(f"{name}: ok ({time.monotonic() - started:.1f} s)", flush=True)


def filled_in(value: Any) -> Any:
    """A part of the compose file with ${NAME:-default} replaced, which is all that it has."""
    if isinstance(value, dict):
        return {key: filled_in(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [filled_in(inner) for inner in value]
    if not isinstance(value, str):
        return value
    return re.sub(r"\$\{(\w+):-([^}]*)\}", lambda x: os.environ.get(x[1]) or x[2], value)


def compose_services() -> dict[str, dict[str, Any]]:
    """The services of the compose file."""
    text = (ROOT / "docker-compose.yaml").read_text(encoding="utf-8")
    return dict(filled_in(yaml.safe_load(text)["services"]))


def serve_names(addresses: dict[str, str]) -> None:
    """Answer DNS as Docker's own server does. Kamailio asks it, and does not read /etc/hosts."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind((f"{NETWORK}.1", 53))
        while True:
            query, client = sock.recvfrom(512)
            labels, end = [], 12
            while size := query[end]:
                labels.append(query[end + 1 : end + 1 + size].decode().lower())
                end += 1 + size
            address, end = addresses.get(".".join(labels)), end + 5
            found = address is not None and query[end - 3] == 1  # type A
            # A reply, with recursion; 3 for no such name.
            head = query[:2] + bytes([0x81, 0x80 if address else 0x83, 0, 1, 0, found, 0, 0, 0, 0])
            # Its name is that of the query; type A, class IN, 60 s, four octets.
            record = b"\xc0\x0c\0\1\0\1\0\0\0\x3c\0\4" + socket.inet_aton(address or "0.0.0.0")
            sock.sendto(head + query[12:end] + record * found, client)


class Images:
    """Buildah with a store of its own in the temporary folder."""

    def __init__(self, folder: Path) -> None:
        self._buildah = ["buildah", "--root", str(folder / "store")]
        self._buildah += ["--runroot", str(folder / "run")]

    def __call__(self, *arguments: str | Path) -> str:
        return said(*self._buildah, *arguments).strip()

    def make_base(self, name: str) -> None:
        """A small Debian with Python."""
        container = self("from", "scratch")
        include = f"--include={PACKAGES}"
        said("debootstrap", "--variant=minbase", include, "bookworm", self.mount(container), MIRROR)
        self("umount", container)
        self("commit", "--quiet", "--rm", container, name)

    def build(self, service: dict[str, Any], base: str) -> None:
        command = ["bud", "--quiet", "--isolation", "chroot", "--format", "docker", "--layers"]
        command += ["--build-arg", f"PYTHON={base}", "--build-arg", f"DEBIAN={base}"]
        # The authorities that this machine trusts, for pip.
        command += ["--volume", "/etc/ssl/certs:/etc/ssl/certs:ro"]
        command += ["--target", service["build"]["target"], "--tag", service["image"]]
        self(*command, ROOT / service["build"]["context"])

    def stand_in(self, name: str, image: str, base: str, folder: Path) -> None:
        """An image from a registry, as far as Debian has it."""
        file = folder / f"{name}.dockerfile"
        file.write_text(f"FROM {base}\n{STAND_INS[name]}", encoding="utf-8")
        command = ["bud", "--quiet", "--isolation", "chroot", "--format", "docker"]
        self(*command, "--tag", image, "--file", file, folder / "run")

    def mount(self, container: str) -> str:
        return self("mount", container)

    def settings(self, image: str) -> dict[str, Any]:
        """Entrypoint, Cmd, User, Env, WorkingDir, Healthcheck and so on."""
        return dict(json.loads(self("inspect", "--type", "image", image))["Docker"]["config"])


class Service:
    """One service in its own network namespace, started as the image and the compose file say."""

    def __init__(self, name: str, number: int, images: Images, folder: Path) -> None:
        self.name, self.address = name, f"{NETWORK}.{number}"
        self.described = compose_services()[name]
        image = images.settings(self.described["image"])
        self._log = folder / f"{name}.log"
        self.files = Path(images.mount(images("from", self.described["image"])))
        self._mounts(folder)
        environment = ["HOME=/ TERM=dumb".split(), image["Env"]]
        given = self.described.get("environment", {})
        environment.append([f"{key}={value}" for key, value in given.items()])
        # Each command becomes the next one, down to the service itself.
        self._inside = ["ip", "netns", "exec", name, "unshare", "--uts"]
        self._inside += ["sh", "-c", 'hostname "$0" && exec "$@"', name]
        self._inside += ["env", "-i", *sum(environment, [])]
        user = image.get("User") or "root"
        self._inside += ["chroot", f"--userspec={user}:{user}", str(self.files)]
        self._inside += ["env", f"--chdir={image.get('WorkingDir') or '/'}"]
        # An entrypoint of the compose file takes the image's command away, too.
        entry = self.described.get("entrypoint", image.get("Entrypoint") or [])
        own = image.get("Cmd") or [] if "entrypoint" not in self.described else []
        self._command = [*entry, *self.described.get("command", own)]
        self._check = (image.get("Healthcheck") or {}).get("Test", [])[1:]
        self.process: subprocess.Popen[bytes] | None = None

    def _mounts(self, folder: Path) -> None:
        for what in ("dev", "proc"):
            said("mount", "--rbind", f"/{what}", self.files / what)
        for volume in self.described.get("volumes", []):
            source, _, rest = volume.partition(":")
            inside, _, mode = rest.partition(":")
            target = self.files / inside.lstrip("/")
            kept = ROOT / source if source.startswith(".") else folder / "volumes" / source
            if not kept.exists():
                # Docker gives a new volume the owner that the image has there.
                kept.mkdir(parents=True)
                shutil.copystat(target, kept)
                os.chown(kept, target.stat().st_uid, target.stat().st_gid)
            said("mount", "--bind", kept, target)
            if mode == "ro":
                said("mount", "-o", "remount,bind,ro", target)

    def connect(self) -> None:
        """A network namespace, with a cable to the bridge in that of this program."""
        (self.files / "etc" / "hosts").write_text(
            f"127.0.0.1 localhost\n{self.address} {self.name}\n"
        )
        (self.files / "etc" / "resolv.conf").write_text(f"nameserver {NETWORK}.1\n")
        port = f"to{self.address.rpartition('.')[2]}"
        for words in (
            f"netns add {self.name}",
            f"link add {port} type veth peer name eth0 netns {self.name}",
            f"link set {port} master hub up",
            f"-n {self.name} address add {self.address}/24 dev eth0",
            f"-n {self.name} link set eth0 up",
            f"-n {self.name} link set lo up",
        ):
            said("ip", *words.split())

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        """Start it; nothing stands between this program and the service, so signals reach it."""
        with self._log.open("ab") as log:
            command = [*self._inside, *self._command, *arguments]
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        return self.process

    def stop(self) -> int:
        """SIGTERM, as `docker stop`; the exit status. Raises TimeoutExpired."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        grace = float(self.described.get("stop_grace_period", "10s").removesuffix("s"))
        return self.process.wait(timeout=grace)

    def healthy(self) -> bool:
        """What the image's HEALTHCHECK says."""
        done = subprocess.run([*self._inside, *self._check], capture_output=True)
        return done.returncode == 0

    def ready(self) -> bool:
        """Its health check's word; without one, whether it has its port."""
        assert self.process is not None
        if self.process.poll() is not None:
            sys.exit(f"FAILED: {self.name} ended\n{self.log()}")
        if self._check:
            return self.healthy()
        kind, port = PORTS.get(self.name, ("udp", 5060))
        sockets = Path(f"/proc/{self.process.pid}/net/{kind}").read_text().splitlines()[1:]
        return any(int(line.split()[1].rpartition(":")[2], 16) == port for line in sockets)

    def log(self) -> str:
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-15:])


def run_all(folder: Path) -> None:
    """Start the services, run the scenarios, restart the agent. In namespaces of its own."""
    images = Images(folder)
    said("ip", "link", "add", "hub", "type", "bridge")
    said("ip", "address", "add", f"{NETWORK}.1/24", "dev", "hub")
    said("ip", "link", "set", "hub", "up")
    with step("containers"):
        services = {
            name: Service(name, number, images, folder)
            for number, (name, described) in enumerate(compose_services().items(), 2)
            if name in ("tester", *CLUSTER) or PROFILE in described.get("profiles", [PROFILE])
        }
        for service in services.values():
            service.connect()
        names = {name: service.address for name, service in services.items()}
        threading.Thread(target=serve_names, args=[names], daemon=True).start()
    several = [services.pop(name) for name in CLUSTER]
    tester, agent = services.pop("tester"), services["rating-agent-hep"]
    with step("start"):
        if agent.healthy():
            sys.exit("FAILED: the agent is healthy before it runs")
        start([*services.values()])
    scenarios = sorted(path.name for path in (ROOT / "tests" / "scenarios").glob("test_*.yaml"))
    with step(f"{len(scenarios)} scenarios"):
        # Each for itself: they have accounts of their own.
        runs = [tester.start(f"/scenarios/{name}", "--target", PROXY) for name in scenarios]
        if sum(run.wait() for run in runs):
            sys.exit(f"FAILED:\n{tester.log()}")
    with step("SIGTERM with calls running, and a second start"):
        restart(agent, tester)
    for service in services.values():
        service.stop()
    if agent.healthy():
        sys.exit("FAILED: the agent is healthy when it is stopped")
    with step("two agents behind a balancer, one of them is killed"):
        cluster(services["sandbox"], *several)


def start(services: list[Service]) -> None:
    """Start services and wait for them."""
    for service in services:
        service.start()
    for service in services:
        wait_until(service.ready, f"{service.name} is ready")


def cluster(sandbox: Service, redis: Service, one: Service, two: Service, proxy: Service) -> None:
    """Calls through the balancer, over UDP and TCP in turn; an agent is killed in the middle."""
    start([redis, sandbox, one, two, proxy])
    wait_until(lambda: shards(one) == shards(two) == 32, "each agent has half of the shards")
    api, began = f"http://{sandbox.address}:8000", int(time.time())
    graphql(api, ACCOUNTS)
    for number, (at, data) in enumerate(packets(began)):
        time.sleep(max(began + at - time.time(), 0))
        if number == 30 and two.process:
            two.process.kill()
            two.process.wait()
            start([two])
        kind = socket.SOCK_STREAM if number % 2 else socket.SOCK_DGRAM
        with socket.socket(socket.AF_INET, kind) as sock:
            sock.connect((proxy.address, 9060))
            sock.sendall(data)

    def charged() -> list[tuple[str, int]]:
        rows = graphql(api, TRANSACTIONS.replace("50", "5000"))["allTransactions"]
        found = [(row["transaction_tag"], row["duration"] or 0) for row in rows]
        return sorted(row for row in found if row[0].startswith("demo-"))

    # Each call is answered after 0.5 s and lasts from 3 to 10 s. Both parties have an account, and
    # the sandbox charges the difference of whole seconds.
    calls = [(n / 2 + 0.5, n / 2 + 3 + 7 * (n % 4) / 3) for n in range(CALLS)]
    wanted = [(f"demo-{n:02}", int(end) - int(begin)) for n, (begin, end) in enumerate(calls)] * 2
    wait_until(lambda: charged() == sorted(wanted), "each call is charged once, with true times")
    wait_until(lambda: shards(one) == shards(two) == 32, "the one that was killed has its half")
    ended = [service.stop() for service in (proxy, one, two, redis, sandbox)]
    if any(ended[1:3]):
        sys.exit(f"FAILED: the agents ended with {ended[1:3]}\n{one.log()}\n{two.log()}")


def shards(agent: Service) -> int:
    """How many an agent in a cluster has."""
    with urllib.request.urlopen(f"http://{agent.address}:9061/status", timeout=5) as answer:
        return int(json.load(answer)["cluster"]["shards"])


def restart(agent: Service, tester: Service) -> None:
    """Twenty calls begin, the agent is restarted while all are running, and they end."""
    text = (ROOT / "tests" / "scenarios" / "test_200_calls.yaml").read_text(encoding="utf-8")
    text = text.replace("call_number: 200", "call_number: 20").replace(
        '"count": 200', '"count": 20'
    )
    text = text.replace("scenario: ", "scenario: /scenarios/")
    (tester.files / "tmp" / "running.yaml").write_text(text, encoding="utf-8")
    calls = tester.start("/tmp/running.yaml", "--target", PROXY)

    def running() -> int:
        with urllib.request.urlopen(f"http://{agent.address}:9061/status", timeout=5) as answer:
            return int(json.load(answer)["calls"]["answered"])

    before = running()
    wait_until(lambda: running() == before + 20, "twenty calls are running")
    if status := agent.stop():
        sys.exit(f"FAILED: the agent ended with status {status}\n{agent.log()}")
    if agent.healthy():
        sys.exit("FAILED: the agent is healthy though it is stopped")
    agent.start()
    wait_until(agent.ready, "the agent runs again")
    if calls.poll() is not None or running() != before + 20:
        sys.exit("FAILED: the calls were over too soon, or the agent forgot some")
    if calls.wait():
        sys.exit(f"FAILED:\n{tester.log()}")


def missing() -> str:
    """Why this machine can't do it; empty where it can."""
    if os.geteuid():
        return "not root"
    lacks = [name for name in ("buildah", "debootstrap", "ip", "unshare") if not shutil.which(name)]
    if lacks:
        return f"not installed: {', '.join(lacks)}"
    tried = "ip link add hub type bridge && mount -t tmpfs none /run"
    done = subprocess.run([*NAMESPACES, "sh", "-c", tried], capture_output=True, text=True)
    return done.stderr.strip()


# Mounts, processes and networks that are gone when the program ends.
NAMESPACES = ["unshare", "--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]


def main() -> int:
    if sys.argv[1:2] == ["inside"]:
        said("mount", "-t", "tmpfs", "none", "/run")
        run_all(Path(sys.argv[2]))
        return 0
    if reason := missing():
        print(f"test-images: skipped, {reason}")
        return 0
    started = time.monotonic()
    # Not /tmp, which may be in memory.
    with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="test-images-") as name:
        folder = Path(name)
        images = Images(folder)
        with step("base"):
            images.make_base("localhost/base")
        for described in compose_services().values():
            if "build" in described and described["image"] not in images(
                "images", "--format", "{{.Name}}"
            ):
                with step(f"image {described['image']}"):
                    images.build(described, "localhost/base")
        for service in STAND_INS:
            image = compose_services()[service]["image"]
            with step(f"stand-in for {image}"):
                images.stand_in(service, image, "localhost/base", folder)
        done = subprocess.run([*NAMESPACES, sys.executable, __file__, "inside", name])
        images("rm", "--all")
    print(
        f"test-images: {'all as expected' if not done.returncode else 'failed'}, "
        f"{time.monotonic() - started:.0f} s"
    )
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())

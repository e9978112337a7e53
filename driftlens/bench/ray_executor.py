"""Jobs on many machines: Ray workers, each with a model of its own (extra ``ray``)."""

from __future__ import annotations

import itertools
import os
import socket
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from driftlens.bench.units import Job, JobRunner, Setting
from driftlens.cases import Case
from driftlens.errors import DriftLensError, ModelError, RequestError, first_line
from driftlens.models import LensModel
from driftlens.records import versions

Record = dict[str, Any]

KNOCK_SECONDS = 10
"""How long a cluster's machine may take to answer."""
NOTICE_SECONDS = 300.0
"""After how long without any result the user is told so."""


@dataclass
class _Part:
    """What one worker does in turn: jobs of the same cases, so that values are shared."""

    jobs: deque[Job]
    attempts: int = 0


@dataclass
class _Running:
    """A job at work."""

    worker: Any
    part: _Part
    job: Job
    received: set[str] = field(default_factory=set)

    @property
    def missing(self) -> list[str]:
        """Ids of the cases that did not come back, in the job's order."""
        missing = self.job.missing - self.received
        return [case.id for case in self.job.cases if case.id in missing]

    @property
    def rest(self) -> Job:
        """The job without what came back."""
        return replace(self.job, missing=frozenset(self.missing))


class RayExecutor:
    """Runs a benchmark's jobs on a Ray cluster.

    A worker that dies is replaced, and what it had not yet handed over is done again: no unit is
    lost, none is recorded twice. On CPUs the results equal a local run's to the bit, if workers
    have as many threads.

    Args:
        load: Makes a worker's model, e.g. ``functools.partial(dl.load_model, "smollm2-135m")``.
        identity: Of the model that the run is about (:meth:`~driftlens.LensModel.identity`); a
            worker with other weights, another type of number, another tokenizer or other versions
            of libraries is refused.
        workers: How many; by default one for each GPU of the cluster, or, without any, for each
            ``threads`` CPUs. In a cluster with GPUs, nodes without any have no workers.
        threads: Of each worker; by default those of this process.
        attempts: How many workers may die of a job before its cases are asked about one by one,
            and how many of one case alone before that is recorded as failed.
        device: Kind of device of the workers' models (``"cpu"``, ``"cuda"``), which results are
            of; by default that of ``identity``. A worker whose model is elsewhere is refused.
        address: Of a running cluster, or ``"auto"`` for the one of this machine; by default one
            is started here, unless Ray is initialised already.

    Raises:
        RequestError: If Ray is not installed, or a number is too small.
    """

    def __init__(
        self,
        load: Callable[[], LensModel],
        identity: Mapping[str, Any],
        *,
        workers: int | None = None,
        threads: int | None = None,
        attempts: int = 3,
        device: str | None = None,
        address: str | None = None,
    ) -> None:
        self._ray = _import_ray()
        self._load = load
        self._identity = dict(identity)
        if device is not None:
            self._identity["device"] = torch.device(device).type
        self.threads = torch.get_num_threads() if threads is None else threads
        self._address = address
        self.attempts = attempts
        for name, number in (
            ("workers", workers), ("threads", self.threads), ("attempts", attempts)
        ):  # fmt: skip
            if number is not None and number < 1:
                raise RequestError(f"{name} is {number}.", "Give at least 1.")
        self._wanted = workers

    @property
    def device(self) -> str:
        """Kind of device of the workers' models."""
        return str(self._identity["device"])

    def run(self, jobs: Iterable[Job], setting: Setting) -> Iterator[tuple[Job, Case, Record]]:
        """A record for each missing case of each job, as they come.

        Raises:
            RequestError: If there is no room for the workers.
            ModelError: If a worker cannot load the model, has another one or other versions of
                libraries, or its model is on another kind of device.
            DriftLensError: What ends a local run, too.
        """
        ray = self._ray
        is_ours = not ray.is_initialized()
        if is_ours:
            self._connect()
        else:
            self._check_cluster()
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        try:
            count, resources = self._room(nodes)
        except RequestError:
            if is_ours:
                ray.shutdown()
            raise
        worker_class = ray.remote(_Worker)

        def hire() -> Any:
            return worker_class.options(**resources).remote(
                self._load, self._identity, versions(), self.threads, setting,
                resources["num_gpus"],
            )  # fmt: skip

        waiting = deque(_parts(jobs))
        idle = [hire() for _ in range(min(count, len(waiting)))]
        running: dict[Any, _Running] = {}
        try:
            while waiting or running:
                while idle and waiting:
                    _begin(running, idle.pop(), waiting.popleft())
                stream = self._first_of(list(running))
                at_work = running[stream]
                try:
                    case_id, record = ray.get(next(stream))
                except StopIteration:
                    del running[stream]
                    at_work.part.jobs.popleft()
                    at_work.part.attempts = 0
                    if at_work.part.jobs:
                        _begin(running, at_work.worker, at_work.part)
                    else:
                        idle.append(at_work.worker)
                except ray.exceptions.RayTaskError as error:
                    raise _cause(error) from error
                except ray.exceptions.RayError as error:
                    del running[stream]
                    yield from self._recover(at_work, error, waiting)
                    with suppress(Exception):  # it may live, and hold the place of the next one
                        ray.kill(at_work.worker)
                    idle.append(hire())
                else:
                    at_work.received.add(case_id)
                    yield at_work.job, _case(at_work.job, case_id), record
        finally:
            for worker in [*idle, *(item.worker for item in running.values())]:
                ray.kill(worker)
            if is_ours:
                ray.shutdown()

    def _first_of(self, running: list[Any]) -> Any:
        """What has something to hand over first; a warning while nothing has."""
        while True:
            ready, _ = self._ray.wait(running, num_returns=1, timeout=NOTICE_SECONDS)
            if ready:
                return ready[0]
            warnings.warn(
                f"No worker has handed over anything for {NOTICE_SECONDS:g} seconds. They may wait "
                "for CPUs or GPUs that others hold (`ray status`), or load a large model. What is "
                "finished is kept if you stop.",
                stacklevel=4,
            )

    def _check_cluster(self) -> None:
        """That the cluster which this process has joined already is the one that was named."""
        joined = str(self._ray.get_runtime_context().gcs_address)
        _, _, port = (self._address or "").rpartition(":")
        named = port.isdigit() and "://" not in str(self._address)
        if named and port != joined.rpartition(":")[2]:
            raise RequestError(
                f"This process has joined the Ray cluster at {joined} already, not that at "
                f"{self._address}.",
                "Leave the address out, or leave that cluster first (ray.shutdown()).",
            )

    def _room(self, nodes: Sequence[Mapping[str, float]]) -> tuple[int, dict[str, float]]:
        """How many workers, and what each takes of its node; Ray lets those wait forever for
        which there is no room. In a cluster with GPUs, nodes without any are left out."""
        gpus = [int(node.get("GPU", 0)) for node in nodes]
        rooms = [int(node.get("CPU", 0)) // self.threads for node in nodes]
        if any(gpus):
            rooms = [room if of_node else 0 for room, of_node in zip(rooms, gpus, strict=True)]
        kind = " with a GPU" if any(gpus) else ""
        if not any(rooms):
            raise RequestError(
                f"No node{kind} has {self.threads} CPUs for a worker.",
                "Give fewer threads (OMP_NUM_THREADS, or threads= in Python).",
            )
        if (self._wanted or 0) > sum(rooms):
            raise RequestError(
                f"There is room for {sum(rooms)} workers of {self.threads} threads"
                f"{f' on nodes{kind}' if kind else ''}, not for {self._wanted}.",
                "Give fewer workers or threads (OMP_NUM_THREADS, or threads= in Python).",
            )
        if not any(gpus):
            return self._wanted or sum(rooms), {"num_cpus": self.threads, "num_gpus": 0.0}
        for per_gpu in range(1, max(rooms) + 1):
            pairs = zip(rooms, gpus, strict=True)
            fit = sum(min(room, of_node * per_gpu) for room, of_node in pairs)
            if fit >= (self._wanted or 1):
                break
        return self._wanted or fit, {"num_cpus": self.threads, "num_gpus": 1 / per_gpu}

    def _connect(self) -> None:
        try:
            self._knock()
            self._ray.init(
                address=self._address, include_dashboard=False, log_to_driver=False,
                logging_level="error",
            )  # fmt: skip
        except (ConnectionError, OSError, ValueError, RuntimeError) as error:
            raise RequestError(
                f"Ray cannot be reached at {self._address or 'this machine'}: {first_line(error)}.",
                "Start a cluster (`ray start --head`), or leave the address out.",
            ) from error

    def _knock(self) -> None:
        """Find out soon whether anything listens at the address: Ray tries for minutes."""
        host, _, port = (self._address or "").removeprefix("ray://").rpartition(":")
        if not port.isdigit():  # none, "auto", or something that Ray refuses at once
            return
        names = [host.strip("[]")]
        if names[0] in ("localhost", "127.0.0.1"):  # Ray takes the node's own address for it
            names.append(self._ray.util.get_node_ip_address())
        for name in names:
            with suppress(OSError, OverflowError):
                socket.create_connection((name, int(port)), timeout=KNOCK_SECONDS).close()
                return
        raise ConnectionError("nothing listens there")

    def _recover(
        self, lost: _Running, error: Exception, waiting: deque[_Part]
    ) -> Iterator[tuple[Job, Case, Record]]:
        """Put back what a dead worker had not handed over, or say that it cannot be done."""
        part = lost.part
        part.attempts += 1
        part.jobs[0] = lost.rest
        if part.attempts >= self.attempts:
            del part.jobs[0]
            alone = [replace(lost.job, missing=frozenset({name})) for name in lost.missing]
            if len(alone) > 1:  # which of them is it? Each has attempts of its own
                part.jobs.extendleft(reversed(alone))
            else:
                reason = f"{part.attempts} workers died of it: {first_line(error)}"
                for job in alone:
                    yield job, _case(job, *job.missing), {"error": reason}
            part.attempts = 0
        if part.jobs:
            waiting.appendleft(part)


def _begin(running: dict[Any, _Running], worker: Any, part: _Part) -> None:
    """Let a worker do the first job of a part."""
    stream = worker.run.options(num_returns="streaming").remote(part.jobs[0])
    running[stream] = _Running(worker, part, part.jobs[0])


class _Worker:
    """A process with a model."""

    def __init__(
        self,
        load: Callable[[], LensModel],
        identity: Mapping[str, Any],
        made_by: Mapping[str, str],
        threads: int,
        setting: Setting,
        gpus: float = 0.0,
    ) -> None:
        torch.set_num_threads(threads)
        self._load, self._identity, self._setting, self._gpus = load, identity, setting, gpus
        self._made_by = made_by
        self._runner: JobRunner | None = None

    def run(self, job: Job) -> Iterator[tuple[str, Record]]:
        """Id and record of each missing case, each handed over at once."""
        if self._runner is None:  # what goes wrong at loading is told like anything else
            self._runner = self._prepare()
        for case, record in self._runner.run(job):
            yield case.id, record

    def _prepare(self) -> JobRunner:
        own = versions()
        other = [name for name in own if own[name] != self._made_by.get(name) and name != "python"]
        if other:
            told = ", ".join(f"{name} {own[name]} ({self._made_by.get(name)})" for name in other)
            raise ModelError(
                f"A worker has other versions than the run: {told}.",
                "Install the same ones on every machine: results would be of both.",
            )
        model = self._load()
        if self._gpus and model.device.type == "cpu":
            raise ModelError(
                "A worker was given a GPU, and its model is on the CPU.",
                'Let load put it there (device="cuda"), or start the cluster without its GPUs '
                "(`ray start --num-gpus 0`).",
            )
        if other := model.differences(self._identity):
            raise ModelError(
                f"A worker's model differs from the run's in {', '.join(other)}.",
                "Give every machine the same files, and load them alike.",
            )
        if model.device.type != self._identity["device"]:
            raise ModelError(
                f"A worker's model is on {model.device.type}, and the run's results are to be of "
                f"{self._identity['device']}.",
                f"Say where workers compute (--device {model.device.type}; "
                f"device={model.device.type!r} in Python), or load their models elsewhere.",
            )
        return JobRunner(model, self._setting)


def _parts(jobs: Iterable[Job]) -> Iterator[_Part]:
    """Jobs that follow one another and have the same cases."""
    for _, own in itertools.groupby(jobs, key=lambda job: job.cases):
        yield _Part(deque(own))


def _case(job: Job, name: str) -> Case:
    return next(case for case in job.cases if case.id == name)


def _cause(error: Any) -> Exception:
    """What a worker raised, as it is where the project raised it on purpose."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, DriftLensError) else error


def _import_ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
        import ray.exceptions
    except ImportError as error:
        raise RequestError(
            "The Ray executor needs Ray.", 'Run pip install "ray>=2.40" (the extra ray).'
        ) from error
    return ray

"""The Ray executor on several simulated nodes: the same results, whoever dies."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from test_bench import ARMS, SEARCHED, bench, cases, model, records

import driftlens as dl
from driftlens.bench import BenchResult, Job, Setting, ray_executor, run_bench, units
from driftlens.bench.ray_executor import RayExecutor
from driftlens.bench.results import UNITS
from driftlens.cases import Case
from driftlens.errors import ModelError, RequestError
from driftlens.records import versions

ray = pytest.importorskip("ray")
__all__ = ["cases", "model"]  # fixtures


def load(pids: str, poison: str = "", seed: int = 1) -> dl.LensModel:
    """What a worker runs first: it leaves its number behind."""
    Path(pids, str(os.getpid())).touch()
    if poison:
        asked = units._asked

        def deadly(model: Any, case: Case, *args: Any) -> Any:
            if case.id == poison:
                os._exit(1)
            return asked(model, case, *args)

        units._asked = deadly  # type: ignore[assignment]
    return dl.load_model(tiny.hf_model("gpt2", seed), tiny.tokenizer(), name="tiny")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes of one CPU each."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    from ray.cluster_utils import Cluster

    cluster = Cluster()
    for _ in range(2):
        cluster.add_node(num_cpus=1, object_store_memory=80 * 2**20)
    join(cluster)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def join(cluster: Any) -> None:
    ray.init(address=cluster.address, log_to_driver=False, logging_level="error")


@pytest.fixture(scope="module")
def expected(model: dl.LensModel, cases: Any, tmp_path_factory: Any) -> BenchResult:
    return on_one_thread(model, cases, tmp_path_factory.mktemp("local"))


def on_one_thread(model: dl.LensModel, cases: Any, out: Path, arms: Any = ARMS) -> BenchResult:
    """A local run, on as many threads as a worker has."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return bench(model, cases, out, arms=arms)
    finally:
        torch.set_num_threads(threads)


class Killing(RayExecutor):
    """Kills one of its workers after each of its first records, as many as `kills`."""

    kills = 0

    def __init__(self, pids: Path, **options: Any) -> None:
        self.pids, self.killed = pids, set[str]()
        super().__init__(**options)

    def run(self, jobs: Iterable[Job], setting: Setting) -> Iterator[Any]:
        for found in super().run(jobs, setting):
            yield found
            alive = sorted({p.name for p in self.pids.iterdir()} - self.killed)
            if len(self.killed) < self.kills and alive:
                self.killed.add(alive[0])
                os.kill(int(alive[0]), signal.SIGKILL)


def test_results_equal_those_of_a_local_run_though_workers_die(
    cluster: Any, model: dl.LensModel, cases: Any, expected: BenchResult,
    tmp_path: Path,
) -> None:  # fmt: skip
    pids = tmp_path / "pids"
    pids.mkdir()
    executor = Killing(pids, load=partial(load, str(pids)), identity=model.identity(), threads=1)
    executor.kills = 1
    found = bench(model, cases, tmp_path / "out", executor=executor)
    assert found.is_complete
    assert records(found) == records(expected)
    assert len(executor.killed) == 1
    assert len(list(pids.iterdir())) >= 3  # another took over


@pytest.mark.real
def test_searched_values_are_those_of_a_local_run(
    cluster: Any, model: dl.LensModel, cases: Any, tmp_path: Path
) -> None:
    pids = tmp_path / "pids"
    pids.mkdir()
    expected = on_one_thread(model, cases[:4], tmp_path / "local", SEARCHED)
    executor = Killing(pids, load=partial(load, str(pids)), identity=model.identity(), threads=1)
    executor.kills = 1
    found = bench(model, cases[:4], tmp_path / "out", SEARCHED, executor=executor)
    assert found.is_complete and not found.failed
    assert records(found) == records(expected)


def test_a_job_that_kills_its_workers_is_recorded_as_failed(
    cluster: Any, model: dl.LensModel, cases: Any, expected: BenchResult, tmp_path: Path
) -> None:
    load_deadly = partial(load, str(tmp_path), cases[1].id)
    executor = RayExecutor(load_deadly, model.identity(), threads=1, workers=1, attempts=1)
    found = run_bench(
        model, cases[:3], ARMS[:1], tmp_path / "out", cases_at_once=2, executor=executor,
        progress=False,
    )  # fmt: skip
    assert found.is_complete
    [(arm, case, reason)] = found.failed
    assert (arm, case) == (ARMS[0].name, cases[1].id)
    assert re.match(r"[12] workers died of it", reason)  # twice if the first took both cases along
    for name in (cases[0].id, cases[2].id):
        assert records(found)[arm][name] == records(expected)[arm][name]


def test_the_case_that_workers_die_of_is_found(model: dl.LensModel, cases: Any) -> None:
    executor = RayExecutor(lambda: model, {}, threads=1, attempts=2)
    job = Job(ARMS[0], tuple(cases[:4]), frozenset(case.id for case in cases[:4]))
    part = ray_executor._Part(deque([job]))
    waiting: deque[Any] = deque()

    def die(job: Job, *received: Any) -> list[Any]:
        waiting.clear()
        lost = ray_executor._Running(None, part, job, {case.id for case in received})
        found = list(executor._recover(lost, RuntimeError("gone"), waiting))
        assert list(waiting) == ([part] if part.jobs else [])
        return found

    first, second, third, fourth = cases[:4]
    assert die(job, first) == []  # another worker does the rest
    assert [j.missing for j in part.jobs] == [{c.id for c in (second, third, fourth)}]
    assert die(part.jobs[0], second) == []  # two died of it: case by case, each with two attempts
    assert [j.missing for j in part.jobs] == [{third.id}, {fourth.id}]
    assert all(j.cases == job.cases for j in part.jobs)
    assert die(part.jobs[0]) == []
    [(_, case, record)] = die(part.jobs[0])
    assert (case, record) == (third, {"error": "2 workers died of it: gone"})
    assert [j.missing for j in part.jobs] == [{fourth.id}]
    assert die(part.jobs[0]) == []  # counted from anew
    assert len(die(part.jobs[0])) == 1
    assert not part.jobs


def test_what_ends_a_local_run_ends_this_one(
    cluster: Any, model: dl.LensModel, cases: Any, tmp_path: Path
) -> None:
    other = partial(load, str(tmp_path), seed=2)
    executor = RayExecutor(other, model.identity(), threads=1, workers=1)
    with pytest.raises(ModelError, match="differs from the run's in model"):
        bench(model, cases, tmp_path / "out", executor=executor)


def worker(model: dl.LensModel, *, gpus: float = 0.0, made_by: Any = None, **changes: str) -> Any:
    return ray_executor._Worker(
        lambda: model, model.identity() | changes, made_by or versions(), torch.get_num_threads(),
        Setting(), gpus,
    )  # fmt: skip


def test_workers_that_would_give_other_results_are_refused(model: dl.LensModel) -> None:
    assert worker(model)._prepare().model is model
    with pytest.raises(ModelError, match="in separator, tokenizer"):
        worker(model, tokenizer="other", separator="")._prepare()
    with pytest.raises(ModelError, match=r"is on cpu, .* to be of cuda.*--device cpu"):
        worker(model, device="cuda")._prepare()
    other = versions() | {"torch": "1.0", "nltk": "0"}
    own = versions()
    told = f"torch {own['torch']} (1.0), nltk {own['nltk']} (0)"
    with pytest.raises(ModelError, match=re.escape(told)):
        worker(model, made_by=other)._prepare()


def test_results_are_of_the_device_of_the_workers(model: dl.LensModel) -> None:
    executor = RayExecutor(lambda: model, model.identity(), device="cuda:1", threads=1)
    assert executor.device == "cuda"
    assert RayExecutor(lambda: model, model.identity(), threads=1).device == "cpu"


class Elsewhere:
    """Runs jobs here, and says that it is a GPU that does."""

    device = "cuda"

    def __init__(self, model: dl.LensModel) -> None:
        self.run = units.LocalExecutor(model).run


def test_units_of_workers_on_gpus_are_not_those_of_cpus(
    model: dl.LensModel, cases: Any, tmp_path: Path
) -> None:
    for executor in (Elsewhere(model), None, Elsewhere(model)):
        bench(model, cases[:1], tmp_path, ARMS[:1], executor=executor)
    kept = [json.loads(line) for line in (tmp_path / UNITS).read_text().splitlines()]
    assert [record["unit"]["device"] for record in kept] == ["cuda", "cpu"]


def test_a_worker_does_not_leave_its_gpu_unused(model: dl.LensModel) -> None:
    idle = worker(model, gpus=0.5)
    with pytest.raises(ModelError, match=r"given a GPU, and its model is on the CPU.*device=.cuda"):
        idle._prepare()


def test_workers_on_the_command_line_load_onto_their_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from driftlens import cli

    asked: list[tuple[str, str | None]] = []
    monkeypatch.setattr(
        cli, "_load", lambda name, device, quiet, dtype: asked.append((name, device))
    )
    for has_gpu in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda has_gpu=has_gpu: has_gpu)
        cli._load_for_worker("m", None, None)
        cli._load_for_worker("m", "cuda:1", None)
        here = [cli._device_here("cuda:1", kind) for kind in ("ray", "local")]
        assert here == ["cuda:1" if has_gpu else None, "cuda:1"]
    assert asked == [("m", None), ("m", "cuda:1"), ("m", "cuda"), ("m", "cuda:1")]


def test_another_cluster_than_the_joined_one_is_refused(cluster: Any, model: dl.LensModel) -> None:
    executor = RayExecutor(lambda: model, {}, address="10.0.0.1:1", threads=1)
    with pytest.raises(
        RequestError, match=r"has joined the Ray cluster at .* not that at 10.0.0.1"
    ):
        list(executor.run([], Setting()))


def test_workers_that_hand_over_nothing_are_told(
    model: dl.LensModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    executor = RayExecutor(lambda: model, {}, threads=1)
    answers = [([], ["a"]), (["a"], [])]
    monkeypatch.setattr(executor._ray, "wait", lambda *_, **__: answers.pop(0))
    with pytest.warns(UserWarning, match="No worker has handed over anything for 300 seconds"):
        assert executor._first_of(["a"]) == "a"


def test_workers_without_room_are_refused(model: dl.LensModel) -> None:
    def room(nodes: list[dict[str, float]], **options: Any) -> tuple[int, float]:
        count, taken = RayExecutor(lambda: model, {}, **options)._room(nodes)
        assert taken["num_cpus"] == options["threads"]
        return count, taken["num_gpus"]

    cpus: list[dict[str, float]] = [{"CPU": 5.0}, {"CPU": 3.0}]
    assert room(cpus, threads=2) == (3, 0.0)
    assert room(cpus, threads=2, workers=2) == (2, 0.0)
    with pytest.raises(RequestError, match="room for 3 workers of 2 threads, not for 4"):
        room(cpus, threads=2, workers=4)
    with pytest.raises(RequestError, match="No node has 6 CPUs"):
        room(cpus, threads=6)
    gpus: list[dict[str, float]] = [{"CPU": 8.0, "GPU": 1.0}, {"CPU": 8.0, "GPU": 1.0}]
    assert room(gpus, threads=1) == (2, 1.0)
    # Three workers on two GPUs: halves, since thirds of both would not fit twice on one.
    assert room(gpus, threads=1, workers=3) == (3, 0.5)
    assert room(gpus, threads=8, workers=1) == (1, 1.0)
    # A worker takes CPUs and a GPU of one node.
    head, short = {"CPU": 48.0}, {"CPU": 2.0, "GPU": 4.0}
    assert room([head, {"CPU": 96.0, "GPU": 8.0}], threads=48) == (2, 1.0)
    assert room([head, *gpus], threads=1) == (2, 1.0)
    assert room([short, *gpus], threads=1) == (4, 1.0)
    assert room([short, *gpus], threads=1, workers=8) == (8, 1 / 3)
    with pytest.raises(RequestError, match="for 2 workers of 8 threads on nodes with a GPU, not"):
        room([head, *gpus], threads=8, workers=3)
    with pytest.raises(RequestError, match="No node with a GPU has 9 CPUs"):
        room([head, *gpus], threads=9)


def test_a_run_without_room_ends_at_once(
    cluster: Any, model: dl.LensModel, cases: Any, tmp_path: Path
) -> None:
    executor = RayExecutor(lambda: model, model.identity(), threads=1, workers=4)
    with pytest.raises(RequestError, match="room for 2 workers"):
        bench(model, cases, tmp_path / "out", executor=executor)


def test_bad_numbers(model: dl.LensModel) -> None:
    for options, text in (
        ({"workers": 0}, "workers is 0"),
        ({"threads": 0}, "threads is 0"),
        ({"attempts": 0}, "attempts is 0"),
    ):
        with pytest.raises(RequestError, match=text):
            RayExecutor(lambda: model, model.identity(), **options)


def test_without_ray(model: dl.LensModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(RequestError, match=r"pip install \"ray>=2"):
        RayExecutor(lambda: model, model.identity())


def test_ray_on_the_command_line(
    cluster: Any,
    model: dl.LensModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The run joins a cluster and leaves it; workers load the model by its name; results are those
    of a run in this process."""
    from driftlens import cli

    folder, plan = tmp_path / "model", tmp_path / "slow.toml"
    tiny.hf_model("gpt2", 1).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    plan.write_text('method = "ft-l"\n[config]\nlayer = 1\nsteps = 2\n')
    options = ["bench", "--model", str(folder), "--methods", "", "--config", str(plan), "--cases"]
    options += ["2", "--quiet", "--out"]

    def run(out: str, *more: str) -> BenchResult:
        monkeypatch.setattr(sys, "argv", ["driftlens", *options, str(tmp_path / out), *more])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert end.value.code in (0, None), end.value.code
        assert "| slow |" in capsys.readouterr().out
        return BenchResult(tmp_path / out)

    ray.shutdown()  # as in a process that knows of no cluster
    try:
        for nowhere in ("nowhere", "127.0.0.1:1", "ray://localhost:1", "localhost:99999"):
            why = "nothing listens there" if ":" in nowhere else ".*"  # Ray would try for minutes
            text = rf"cannot be reached at {nowhere}: {why}\. .* leave the address out"
            with pytest.raises(RequestError, match=text):
                RayExecutor(lambda: model, {}, address=nowhere)._connect()
        spread = run("ray", "--executor", "ray", "--workers", "1", "--ray-address", cluster.address)
        assert not ray.is_initialized()  # left as it was
    finally:
        join(cluster)
    assert sum(node["Alive"] for node in ray.nodes()) == 2
    assert spread.is_complete and not spread.failed
    local = run("local")
    for arm, found in records(local).items():
        for case, record in found.items():
            mine = records(spread)[arm][case]
            assert [a["right"] for a in mine["answers"]] == pytest.approx(
                [a["right"] for a in record["answers"]], abs=1e-5
            )

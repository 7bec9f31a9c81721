"""Many processes on a local Ray: with a worker killed in the middle, every line is there once."""

import importlib.util
import json
import os
import signal
import sys

import pytest

import winnowkv as wk
from support.evaluation import ROWS, said, tiny_evaluation
from winnowkv.evaluate.report.store import ResultStore
from winnowkv.evaluate.tasks import run as runner
from winnowkv.evaluate.tasks.run import Evaluation, Worker, identity, missing
from winnowkv.scale import join, pool

pytestmark = pytest.mark.slow

# Ray itself is not imported here: it listens on loopback only if scale/ imports it first.
LINES = ROWS * 5  # full once, two other policies at two budgets
needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed (pip install ray)")


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    return tiny_evaluation(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def workers(asked):
    assert join(3, None)
    with pool(asked, 2) as made:  # one core stays free, for the workers of other tests
        yield made
    importlib.import_module("ray").shutdown()


def work_on(asked, store):
    return missing(store, asked, asked.rows())


@pytest.fixture(scope="module")
def alone(asked, tmp_path_factory):
    """What one process makes of the same rows."""
    worker = Worker(asked)
    store = ResultStore(tmp_path_factory.mktemp("alone"), worker.config, identity)
    runner.run(worker, store, work_on(asked, store), lambda what: None)
    store.close()
    assert all(line["failed"] is None for line in store.lines)
    return worker.config, store.lines


class Killer:
    """Called for every line; after the first it kills worker processes."""

    def __init__(self, pids):
        self.pids = pids
        self.lines = 0

    def __call__(self, what):
        self.lines += 1
        if self.lines == 1:
            for pid in self.pids:
                os.kill(pid, signal.SIGKILL)


@needs_ray
def test_a_killed_worker_loses_nothing_and_doubles_nothing(asked, workers, alone, tmp_path):
    config, expected = alone
    assert workers.config == config  # so that many processes can continue the folder of one
    store = ResultStore(tmp_path, workers.config, identity)
    killer = Killer(workers.processes())
    workers.run(store, work_on(asked, store), killer)
    store.close()
    assert workers.deaths >= 2
    assert killer.lines == len(store.lines) == len({identity(line) for line in store.lines}) == LINES
    assert said(store.lines) == said(expected)
    assert said(map(json.loads, store.file.read_text().splitlines())) == said(expected)


@needs_ray
def test_a_restarted_driver_continues_from_the_results(asked, workers, alone, tmp_path):
    store = ResultStore(tmp_path, workers.config, identity)
    told = []

    def stop_at_seven(what):
        told.append(what)
        if len(told) == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        workers.run(store, work_on(asked, store), stop_at_seven)
    store.close()
    again = ResultStore(tmp_path, workers.config, identity)
    assert len(again.lines) == 7
    told.clear()
    workers.run(again, work_on(asked, again), told.append)
    again.close()
    assert len(told) == LINES - 7
    assert said(again.lines) == said(alone[1])


@needs_ray
def test_a_shard_that_keeps_dying_fails_with_its_reason_and_the_run_continues(asked, workers, alone, tmp_path):
    store = ResultStore(tmp_path, workers.config, identity)
    workers.run(store, work_on(asked, store), Killer(workers.processes()), retries=0)
    store.close()
    lost = {line["row"] for line in store.lines if line["failed"]}
    assert 1 <= len(lost) <= 2
    assert all(line["score"] is None and "its worker died" in line["failed"] for line in store.lines if line["row"] in lost)
    assert len({identity(line) for line in store.lines}) == len(store.lines) == LINES
    assert said(line for line in store.lines if line["row"] not in lost) == said(
        line for line in alone[1] if line["row"] not in lost
    )


@needs_ray
def test_the_local_ray_is_out_of_reach_for_others(workers):
    import ray

    assert ray.util.get_node_ip_address() == "127.0.0.1"


@needs_ray
def test_workers_run_at_the_priority_of_the_driver(workers):
    mine = os.getpriority(os.PRIO_PROCESS, 0)
    assert [os.getpriority(os.PRIO_PROCESS, pid) for pid in workers.processes()] == [mine, mine]


@needs_ray
def test_a_missing_model_raises_the_error_of_a_single_process(workers, tmp_path):
    broken = Evaluation(tasks=("longeval",), policies=("full",), budgets=(0.5,), model=str(tmp_path / "nowhere"))
    with pytest.raises(wk.ModelNotFoundError, match="nowhere"), pool(broken, 1):
        pass


@needs_ray
def test_more_workers_than_the_cluster_has_cores_are_refused(asked, workers):
    with pytest.raises(wk.InputError, match="4 workers need one each of CPU cores, the cluster has 3"), pool(asked, 4):
        pass


def test_a_missing_ray_is_named_with_the_command_that_gets_it(asked, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(wk.InputError, match=r"pip install 'winnowkv\[scale\]'"), pool(asked, 2):
        pass

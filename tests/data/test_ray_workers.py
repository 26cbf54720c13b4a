"""A Ray cluster that loses a machine: the same bytes as in one process, in order, nothing missing.

Minutes, so among the slow tests.
"""

import signal
import time

import pytest

from difflora_core.data import prepare as preparing
from difflora_core.data.prepare import prepare
from difflora_core.data.ray_workers import RayWorkers
from difflora_core.data.workers import open_workers
from difflora_core.errors import ConfigError, DatasetError

pytestmark = pytest.mark.slow


def test_workers_of_a_cluster(ray_cluster):
    """In order, errors as they are, and a machine that is lost in the middle."""

    def doubled(number):  # inside, so that workers need not know this file
        if number == 7:
            raise DatasetError("seven")
        return 2 * number

    def slow(number):
        time.sleep(0.3)
        return number

    nodes = [ray_cluster.add_node(num_cpus=1) for _ in range(2)]
    stops = signal.getsignal(signal.SIGTERM)
    with RayWorkers(ray_cluster.address, 2) as crew:
        assert signal.getsignal(signal.SIGTERM) is stops
        assert list(crew.each(doubled, range(5))) == [0, 2, 4, 6, 8]
        with pytest.raises(DatasetError, match="seven"):
            list(crew.each(doubled, range(9)))
        found = crew.each(slow, range(12))
        got = [next(found)]
        ray_cluster.remove_node(nodes[0], allow_graceful=False)
        assert [*got, *found] == list(range(12))
    ray_cluster.remove_node(nodes[1])
    with pytest.raises(ConfigError, match="no Ray cluster"), RayWorkers("127.0.0.1:1"):
        pass


def test_prepare_on_a_cluster_that_loses_a_machine(
    ray_cluster, people_folder, demo_config, tmp_path, monkeypatch
):
    monkeypatch.setattr(preparing, "LOOKS", 1)
    prepare(people_folder, tmp_path / "alone", demo_config)
    nodes = [ray_cluster.add_node(num_cpus=1) for _ in range(2)]
    told = []

    def report(what, done, total):
        told.append(done)
        if len(told) == 3:
            ray_cluster.remove_node(nodes[0], allow_graceful=False)

    with open_workers(2, ray_cluster.address) as crew:
        prepare(people_folder, tmp_path / "ray", demo_config, crew, report=report)
    ray_cluster.remove_node(nodes[1])
    assert len(told) > 3
    one, other = (
        {p.name: p.read_bytes() for p in (tmp_path / name).glob("*.*")} for name in ("alone", "ray")
    )
    assert one == other

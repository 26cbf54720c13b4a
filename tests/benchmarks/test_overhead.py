import pytest

from benchmarks.cost.overhead import BASE, ROWS, Watch, prompt, table
from difflora_core.demo.comfyui.client import Progress


class Server:
    """A process that has used half as much processor time as time has passed."""

    def __init__(self):
        self.clock = 0.0

    def cpu_times(self):
        self.clock += 2.0
        return type("Times", (), {"user": self.clock, "system": 1.0})


def test_steps_are_timed_without_what_comes_before_them():
    watch = Watch(Server())
    watch(Progress("demo", "DiffLoRA_LoadDemo", 0, 1))
    for value in (0, 1, 2, 5):  # ComfyUI leaves steps out when they come fast
        watch(Progress("sampler", "KSampler", value, 5))
    assert len(watch.steps) == 3
    wall, processor = watch.per_step()
    assert processor == pytest.approx(2 * 2.0 / 4)
    assert wall >= 0


def test_ratios_are_taken_within_a_round():
    slow = [1.0, 10.0, 100.0]  # the machine gets slower
    times = {BASE: [(s, 2 * s) for s in slow], "lora": [(1.5 * s, 2 * s) for s in slow]}
    rows = table(times)
    same = {"ratio": 1.0, "cpu_ratio": 1.0}
    assert rows[BASE] == {"seconds_per_step": 10.0, **same}
    dearer = {"ratio": 1.5, "cpu_ratio": 1.0}
    assert rows["lora"] == {"seconds_per_step": 15.0, **dearer}


@pytest.mark.parametrize("row", ROWS)
def test_every_link_of_a_row_ends_at_a_node(row):
    nodes = prompt("person.png", row, 3)
    for name, entry in nodes.items():
        for value in entry["inputs"].values():
            if isinstance(value, list):
                assert value[0] in nodes, name

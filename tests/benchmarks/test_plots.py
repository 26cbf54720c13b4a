"""Plots show the numbers of the report that they are given."""

import json

import pytest
from PIL import Image

from benchmarks.identity import plots
from difflora_core.errors import ConfigError

PEOPLE = {
    "base": {"face_similarity": [0.0, 0.2], "prompt_agreement": [0.9, 1.0]},
    "functional, 1 photo": {"face_similarity": [0.7, 0.9], "prompt_agreement": [0.8, 0.9]},
    "functional, 1 photo x 1.25": {"face_similarity": [0.8, 1.0], "prompt_agreement": [0.7, 0.8]},
    "not drawn": {"denoising_loss": [0.1, 0.1]},
}
KEPT = {"kept_face_similarity": 0.5, "kept_parameter_error": 0.4}


def curves(figure):
    """Label to points of every line that has a label."""
    axes = figure.axes[0]
    handles, labels = axes.get_legend_handles_labels()
    lines = (handle[0] if isinstance(handle, tuple) else handle for handle in handles)
    return {
        name: [tuple(map(float, point)) for point in line.get_xydata()]
        for name, line in zip(labels, lines, strict=True)
    }


def test_a_row_at_several_strengths_is_one_line_of_its_means():
    found = curves(plots.identity({"rows": {}, "per_identity": PEOPLE}))
    assert set(found) == {"base", "functional, 1 photo"}
    assert found["base"] == [pytest.approx((0.95, 0.1))]
    expected = [pytest.approx((0.85, 0.8)), pytest.approx((0.75, 0.9))]
    assert found["functional, 1 photo"] == expected


def test_rows_that_nobody_wants_are_not_drawn_but_base_is():
    found = plots.only({"rows": {}, "per_identity": PEOPLE}, ["=functional, 1 photo"])
    assert set(found["per_identity"]) == set(PEOPLE) - {"not drawn"}
    assert set(plots.only({"rows": {}, "per_identity": PEOPLE}, ["=other"])["per_identity"]) == {
        "base"
    }


def test_intervals_are_those_of_people():
    value, below, above = plots._interval([0.0, 1.0])
    assert (value, below, above) == (0.5, 0.5, 0.5)
    assert plots._interval([0.3, 0.3]) == pytest.approx((0.3, 0.0, 0.0))


def test_compression_draws_kinds_by_size_and_leaves_ablations_out():
    rows = {
        "linear, 128 numbers": {"numbers": 128.0, **KEPT},
        "linear, 32 numbers": {"numbers": 32.0, **KEPT, "kept_face_similarity": 0.2},
        "structured, 128 numbers, plain MSE": {"numbers": 128.0, **KEPT},
    }
    assert curves(plots.compression({"rows": rows})) == {
        "linear, face judge": [(32.0, 0.2), (128.0, 0.5)],
        "linear, parameter judge": [(32.0, 0.4), (128.0, 0.4)],
    }


def test_seeds_are_points_and_their_means_are_not():
    rows = {
        f"DreamBooth, {what}": {"face_similarity": face, "parameter_error": 0.3}
        for what, face in (("seed 0", 0.8), ("seed 1", 0.9), ("mean", 0.85))
    }
    points = plots.seeds({"rows": rows}).axes[0].collections[0].get_offsets().tolist()
    assert points == [[0.8, 0.3], [0.9, 0.3]]


def test_the_command_writes_a_picture_for_each_file_that_it_is_given(tmp_path, capsys):
    report, run = tmp_path / "table.json", tmp_path / "run"
    report.write_text(json.dumps({"rows": {}, "per_identity": PEOPLE}))
    run.mkdir()
    events = [{"step": 1, "denoising": 0.5}, {"step": 2, "validation": 1}, {"step": 3}]
    (run / "events.jsonl").write_text("\n".join(map(json.dumps, events)))
    arguments = ["--identity", str(report), "--run", f"ours={run}", "--out", str(tmp_path / "out")]
    assert plots.main(arguments) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"identity.png", "training.png"}
    with Image.open(tmp_path / "out" / "identity.png") as picture:
        assert min(picture.size) > 300
    assert "identity.png" in capsys.readouterr().out
    assert plots.read_events(run) == {"step": [1.0], "denoising": [0.5]}


def test_what_is_no_report_and_no_run_is_named(tmp_path):
    (tmp_path / "other.json").write_text("[1]")
    with pytest.raises(ConfigError, match="is no report"):
        plots.read_report(tmp_path / "other.json")
    with pytest.raises(ConfigError, match="no training run"):
        plots.read_events(tmp_path)

"""Plots of a sweep and of results: one colour a line, seeds as a band, axes with names, legends off the curves."""

import json

import pytest

pytest.importorskip("matplotlib")

from matplotlib import rc_context
from matplotlib.colors import to_hex

from benchmarks import plots
from benchmarks.report import results
from sampled_sae.training import sweep_plots
from sampled_sae.training.evaluation import HISTOGRAM_EDGES


def row(name, l, score, seed, fvu):
    counts = [seed + i for i in range(len(HISTOGRAM_EDGES) - 1)]
    kind = {"name": f"{name}_seed{seed}", "l": l, "score": score, "seed": seed}
    return {**kind, "fvu": fvu, "features_for_90": 100 * fvu, "frequency_histogram": counts}


def rows(n_scores=2):
    scores = [f"s{i}" for i in range(n_scores)]
    pooled = [row(f"l{l}_{s}", l, s, seed, l + seed) for l in (1.0, 4.0) for s in scores for seed in (0, 1)]
    return [*pooled, *(row("topk", None, None, seed, 2.0 + seed) for seed in (0, 1))]


def colours(axis):
    return [to_hex(line.get_color()) for line in axis.get_lines()]


def run_folder(folder, found):
    for i, one in enumerate(found):
        lines = [{"tokens": 10 * t, "fvu": 1 / t + i, "l0": None if t == 2 else 4.0} for t in (1, 2, 3)]
        (folder / one["name"]).mkdir()
        (folder / one["name"] / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.mark.parametrize("n_scores", [2, 14])
def test_no_two_lines_share_a_colour_and_all_are_named_below(tmp_path, n_scores):
    found = rows(n_scores)
    training = sweep_plots.training(found, run_folder(tmp_path, found))
    for figure, n_lines in (
        (sweep_plots.quality(found), n_scores + 1),
        (sweep_plots.frequency(found), 2 * n_scores + 1),
        (training, 2 * n_scores + 1),
    ):
        for axis in figure.axes:
            assert len(set(colours(axis))) == len(axis.get_lines()) == n_lines
            assert axis.get_legend() is None
            assert axis.get_xlabel()
            assert axis.get_ylabel()
        (legend,) = figure.legends
        assert len(legend.get_texts()) == n_lines
        figure.draw_without_rendering()
        bottom = min(axis.get_tightbbox().y0 for axis in figure.axes)
        assert legend.get_window_extent().y1 <= bottom


def test_seeds_are_their_mean_in_a_band():
    axis = sweep_plots.quality(rows()).axes[0]
    lines = {line.get_label(): line.get_xydata().tolist() for line in axis.get_lines()}
    assert lines["s0"] == [[1.0, 1.5], [4.0, 4.5]]
    assert set(lines["topk"][0]) & {2.5}
    (low, high) = axis.collections[0].get_paths()[0].get_extents().intervaly
    assert (low, high) == (1.0, 5.0)


def test_counts_have_no_negative_half():
    (axis,) = sweep_plots.frequency(rows()).axes
    assert axis.get_ylim()[0] == 0


def test_the_race_of_libraries_has_a_colour_for_each():
    with rc_context(plots.STYLE):
        figure = plots.equal_time(results()["equal_time"])
    for axis in figure.axes:
        styles = [line.get_linestyle() for line in axis.get_lines()]
        assert len(set(zip(colours(axis), styles, strict=True))) == len(styles) > 12
        assert len({colour for colour, style in zip(colours(axis), styles, strict=True) if style != ":"}) > 8

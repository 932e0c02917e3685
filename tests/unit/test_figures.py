"""Figures show what the run folders hold: the right runs on the right axes, no invented points, the same files again."""

import json
import xml.etree.ElementTree as ET

import numpy as np
import pytest
import torch
from PIL import Image

from distributed_at.cli import main
from distributed_at.errors import ConfigError
from distributed_at.evaluation.layer_statistics import batch_statistics, choose_layer, norm_layer_names
from distributed_at.models import build_model
from distributed_at.models.norm import bn_buffers
from distributed_at.observe.figures import (
    LayerStatistics,
    attack_iterations,
    batch_and_running,
    branch_statistics,
    clean_ratio,
    depth,
    sample_channels,
    save,
)
from distributed_at.observe.figures.curves import depth_of, strategy_of
from distributed_at.observe.record import load_run
from distributed_at.recipes import dump_yaml, load_recipe
from distributed_at.statistics import wilson
from tests import records


def write_run(folder, ref, accuracies, *, branch="adv", clean=0.6, total=50_000):
    """Write a run folder with a recipe and summaries of PGD at some numbers of steps; return its record."""
    folder.mkdir(parents=True)
    config = load_recipe(f"imagenet/xie_yuille/{ref}").config
    (folder / "recipe.yaml").write_text(dump_yaml(config))
    asked = {e.attack.num_steps: records.protocol(config, e) for e in records.singles(config) if e.attack is not None}
    protocols = [({"kind": "clean", "name": "clean", "num_steps": 0}, "clean_accuracy", clean)]
    for steps, accuracy in accuracies.items():
        content = {"kind": "pgd", "num_steps": steps, "eps": 16.0, "target": "random_other", "norm": "linf"}
        protocols.append((asked.get(steps, {**content, "name": f"PGD-{steps}"}), "robust_accuracy", accuracy))
    for number, (protocol, metric, accuracy) in enumerate(protocols):
        target = folder / "evaluations" / str(number)
        target.mkdir(parents=True)
        row = {"protocol": protocol, "metric": metric, "branch": branch, "split": "test"}
        row |= {"correct": round(accuracy * total), "total": total}
        (target / "summary.json").write_text(json.dumps(row))
    return load_run(folder)


def lines(drawn, axis=0):
    """Return label -> (x, y) of the measured lines (the paper's are dotted and have no label)."""
    found = {}
    for container in drawn.figure.axes[axis].containers:
        x, y = container.lines[0].get_data()
        found[container.get_label()] = ([float(v) for v in x], [round(float(v), 6) for v in y])
    return found


def dotted(drawn, axis=0):
    return [
        [round(float(v), 6) for v in line.get_ydata()]
        for line in drawn.figure.axes[axis].lines
        if line.get_linestyle() == ":"
    ]


@pytest.fixture
def ratios(tmp_path):
    rows = {"n30-clean0": 0.39, "n30-clean40": 0.30, "n30-clean100": 0.21}
    return [write_run(tmp_path / row, f"table7.yaml#{row}", {10: 0.5, 2000: a}) for row, a in rows.items()]


def test_figure_1_shows_the_longest_common_attack_by_share_of_clean_images(ratios):
    drawn = clean_ratio(ratios)
    assert lines(drawn) == {"BN": ([0.0, 40.0, 100.0], [39.0, 30.0, 21.0])}
    assert dotted(drawn) == [[39.2, 29.1, 20.9]]
    assert "PGD-2000" in drawn.caption


def test_figure_1_keeps_norms_apart_and_leaves_pairing_and_frozen_statistics_out(ratios, tmp_path):
    more = [
        write_run(tmp_path / "mbn", "table7.yaml#n30-mbn", {2000: 0.38}),
        write_run(tmp_path / "alp", "table7.yaml#n30-alp", {2000: 0.99}),
        write_run(tmp_path / "star", "table7.yaml#n30-clean0-star", {2000: 0.98}),
    ]
    found = lines(clean_ratio([*ratios, *more]))
    assert found["MBN_adv"] == ([100.0], [38.0])
    assert not {99.0, 98.0} & {y for _, ys in found.values() for y in ys}


def test_figure_1_needs_two_shares_and_one_common_attack(ratios, tmp_path):
    assert clean_ratio(ratios[:1]) is None
    other = write_run(tmp_path / "other", "table7.yaml#n30-clean20", {20: 0.4})
    assert clean_ratio([ratios[0], other]) is None


def test_intervals_are_drawn_around_each_point(ratios):
    drawn = clean_ratio(ratios[:2])
    segments = drawn.figure.axes[0].containers[0].lines[2][0].get_segments()
    low, high = sorted(float(y) for y in segments[0][:, 1])
    assert low < 39.0 < high
    expected = wilson(19_500, 50_000)
    assert high - low == pytest.approx(100 * (expected[1] - expected[0]), rel=1e-6)


def test_figures_2_and_3_show_curves_over_attack_iterations_by_norm(ratios, tmp_path):
    mixture = write_run(tmp_path / "mbn", "table7.yaml#n30-mbn", {10: 0.52, 2000: 0.38})
    second = attack_iterations([*ratios, mixture], shared=True, name="figure2")
    third = attack_iterations([*ratios, mixture], shared=False, name="figure3")
    assert set(lines(second)) == {f"100% adv + {r}% clean" for r in (0, 40, 100)}
    assert lines(second)["100% adv + 0% clean"] == ([10.0, 2000.0], [50.0, 39.0])
    assert lines(third) == {"MBN_adv, 100% adv + 100% clean": ([10.0, 2000.0], [52.0, 38.0])}


def test_a_mixtures_clean_branch_is_no_point_of_a_robustness_curve(tmp_path):
    clean = write_run(tmp_path / "mbn", "table7.yaml#n30-mbn", {10: 0.1, 20: 0.05}, branch="clean")
    assert attack_iterations([clean], shared=False, name="figure3") is None


def test_figure_7_shows_standard_and_adversarial_training_by_depth(tmp_path):
    runs = [
        write_run(tmp_path / f"a{n}", f"figure7.yaml#adversarial-resnet{n}", {2000: a})
        for n, a in ((152, 0.42), (638, 0.46))
    ]
    runs += [
        write_run(tmp_path / f"s{n}", f"figure7.yaml#standard-resnet{n}", {}, clean=a)
        for n, a in ((152, 0.78), (638, 0.80))
    ]
    drawn = depth(runs)
    assert lines(drawn, 0) == {"0% adv + 100% clean, clean accuracy": ([152.0, 638.0], [78.0, 80.0])}
    assert lines(drawn, 1) == {"100% adv + 0% clean*, PGD-2000": ([152.0, 638.0], [42.0, 46.0])}
    assert [depth_of(r) for r in runs] == [152, 638, 152, 638]
    assert "PGD: targeted, eps 16/255" in drawn.caption
    assert depth(runs[:1]) is None


def test_curves_of_one_strategy_are_told_apart_by_their_runs_names(tmp_path):
    deep = write_run(tmp_path / "deep", "table7.yaml#resnet638", {20: 0.5, 100: 0.4})
    flat = write_run(tmp_path / "flat", "table7.yaml#n30-clean0-star", {20: 0.4, 100: 0.3})
    other = write_run(tmp_path / "other", "table7.yaml#n30-clean100", {20: 0.3, 100: 0.2})
    drawn = attack_iterations([deep, flat, other], shared=True, name="figure2")
    assert set(lines(drawn)) == {
        f"100% adv + 0% clean* ({deep.name})", f"100% adv + 0% clean* ({flat.name})", "100% adv + 100% clean",
    }  # fmt: skip


def test_legend_lies_above_the_axis_and_names_the_papers_lines_once(ratios):
    axis = clean_ratio(ratios).figure.axes[0]
    axis.figure.draw_without_rendering()
    assert axis.get_legend().get_window_extent().y0 >= axis.get_window_extent().y1
    texts = [text.get_text() for text in axis.get_legend().get_texts()]
    assert texts.count("the paper's") == 1


@pytest.mark.parametrize(
    ("model", "layers"),
    [
        ({"arch": "resnet", "block": "basic", "blocks": [2, 2, 2, 2]}, 18),
        ({"arch": "resnet", "block": "bottleneck", "blocks": [3, 8, 36, 3]}, 152),
        ({"arch": "preact_resnet34", "blocks": None}, 34),
        ({"arch": "resnet638", "blocks": None}, 638),
        ({"arch": "wide_resnet", "blocks": None, "depth": 34}, None),
    ],
)
def test_depth_counts_convolutions_and_the_classifier(tmp_path, model, layers):
    (tmp_path / "recipe.yaml").write_text(json.dumps({"name": "x", "model": model}))
    assert depth_of(load_run(tmp_path)) == layers


def test_strategies_are_named_in_the_papers_words(tmp_path):
    for row, name in {
        "n30-mbn-alp-star": "MBN_adv, 100% adv + 100% clean, ALP*",
        "n30-gn": "GN, 100% adv + 100% clean",
        "n30-clean20": "100% adv + 20% clean",
    }.items():
        record = write_run(tmp_path / row, f"table7.yaml#{row}", {})
        assert strategy_of(record, "adv") == name


def _statistics(name, channels=32, shift=0.0, scale=1.0):
    values = np.linspace(-1, 1, channels)
    return LayerStatistics(name=name, mean=values + shift, variance=scale * (1 + values**2))


def test_figure_5_counts_channels_and_measures_how_far_the_branches_are_apart():
    drawn = branch_statistics(
        _statistics("MBN_clean"), _statistics("MBN_adv", shift=0.5, scale=4.0), layer="layer2.0.bn1", run="r",
        channels=sample_channels(32),
    )  # fmt: skip
    assert "adversarial variance larger on 32 of 32 channels" in drawn.caption
    assert "median variance ratio adv / clean 4.000" in drawn.caption
    axis = drawn.figure.axes[0]
    assert len(axis.get_xticks()) == 20
    clean, adv = (np.asarray(c.get_offsets())[:, 1] for c in axis.collections[1:])
    np.testing.assert_allclose(adv - clean, 0.5)


def test_figure_5_measures_means_by_magnitude_and_in_pooled_standard_deviations():
    clean = LayerStatistics(name="MBN_clean", mean=np.array([-1.0, 2.0, 0.5, 3.0]), variance=np.full(4, 9.0))
    adv = LayerStatistics(name="MBN_adv", mean=np.array([-2.0, 1.0, -4.0, 8.0]), variance=np.full(4, 23.0))
    drawn = branch_statistics(clean, adv, layer="bn1", run="r", channels=np.arange(4))
    assert "magnitude of the mean larger on 3 of 4 channels" in drawn.caption
    # differences 1, 1, 4.5 and 5 over sqrt((9 + 23) / 2) = 4: the median lies between 1 / 4 and 4.5 / 4
    assert "median |difference of means| 0.688 standard deviations" in drawn.caption


def test_figure_6_shows_every_batch_beside_the_running_statistics():
    batches = [_statistics("batch 1", scale=1.2), _statistics("batch 2", scale=0.8)]
    drawn = batch_and_running(batches, _statistics("running"), layer="bn1", run="r", channels=sample_channels(32))
    assert "relative difference of variances 0.200" in drawn.caption
    assert [t.get_text() for t in drawn.figure.axes[0].get_legend().get_texts()] == ["running", "batch 1", "batch 2"]


def test_sampled_channels_are_distinct_sorted_and_the_same_again():
    channels = sample_channels(512)
    assert len(set(channels.tolist())) == 20
    assert (np.diff(channels) > 0).all()
    np.testing.assert_array_equal(channels, sample_channels(512))
    np.testing.assert_array_equal(sample_channels(8), np.arange(8))


def test_files_are_valid_and_equal_runs_give_equal_bytes(ratios, tmp_path):
    first = save(clean_ratio(ratios), tmp_path / "a")
    second = save(clean_ratio(ratios), tmp_path / "b")
    assert [p.name for p in first] == ["figure1.svg", "figure1.png"]
    assert ET.parse(first[0]).getroot().tag.endswith("svg")
    assert "clean images kept" in first[0].read_text()
    pixels = np.asarray(Image.open(first[1]).convert("L"))
    assert pixels.std() > 5, "the picture is empty"
    assert first[0].read_bytes() == second[0].read_bytes()


@pytest.mark.parametrize("norm", ["bn", "mbn"])
def test_batch_statistics_are_what_training_adds_to_the_running_ones(norm):
    """One train-mode forward moves running statistics by momentum towards exactly the captured batch statistics."""
    config = load_recipe("imagenet/smoke.yaml", [f"model.norm={norm}", "model.blocks=[1,1,1,1]"] + (
        ["objective={name: mixture}"] if norm == "mbn" else []
    )).config.model  # fmt: skip
    torch.manual_seed(0)
    network = build_model(config, num_classes=10)
    images = torch.rand(6, 3, 32, 32)
    layer = choose_layer(norm_layer_names(network.state_dict()), None)
    assert layer.startswith("layer2.")
    before = {name: b.clone() for name, b in bn_buffers(network).items()}
    mean, variance = batch_statistics(network, images, layer=layer)
    assert all(torch.equal(before[name], b) for name, b in bn_buffers(network).items())
    network.train()
    network(images)
    name = f"{layer}.adv" if norm == "mbn" else layer
    moved = bn_buffers(network)
    torch.testing.assert_close(moved[f"{name}.running_mean"].double(), 0.1 * mean, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(moved[f"{name}.running_var"].double(), 0.9 + 0.1 * variance, rtol=1e-4, atol=1e-6)


def test_unknown_layer_is_named_with_the_nearest_one():
    with pytest.raises(ConfigError, match=r"did you mean 'layer2\.0\.bn1'|Did you mean"):
        choose_layer(["layer2.0.bn1", "layer2.0.bn2"], "layer2.0.bn")
    with pytest.raises(ConfigError, match="no batch norm"):
        choose_layer([], None)


def test_verb_writes_files_and_says_what_the_runs_lack(ratios, tmp_path, capsys):
    names = [str(r.folder) for r in ratios]
    assert main(["figures", *names, "--output", str(tmp_path / "out"), "--json"]) == 0
    out = capsys.readouterr()
    rows = json.loads(out.out)
    assert [row["figure"] for row in rows] == ["figure1", "figure2"]
    assert "figure6 of" in out.err  # these runs have no checkpoint
    assert main(["figures", names[0], "--output", str(tmp_path / "none"), "--batches", "-1"]) == 2
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "recipe.yaml").write_text((ratios[0].folder / "recipe.yaml").read_text())
    assert main(["figures", str(bare), "--output", str(tmp_path / "none")]) != 0
    assert "give no figure" in capsys.readouterr().err

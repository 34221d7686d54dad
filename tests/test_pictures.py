"""Pictures show what is there, where it is; and nothing prints an address."""

import copy
import importlib
import re
import shutil
import subprocess

import matplotlib.image
import numpy as np
import pytest
import torch

import voxloom as vx
from voxloom.errors import MissingDependencyError, ModeError, SizeError, SubjectError
from voxloom.inference import ProcessLauncher
from voxloom.io.labels import Label
from voxloom.plotting import planes, plans
from voxloom.plotting.report import CaseReport, write_index, write_report


@pytest.fixture
def marked():
    """A volume in LPS, bright at the right, the anterior and the superior end of the patient."""
    data = torch.zeros(1, 20, 30, 40)
    data[0, :3] = 1  # of an axis that goes to the left, the first voxels are at the right
    data[0, :, -3:] = 0  # and of one that goes to the back, the last ones are posterior
    data[0, :, :3] = 2
    data[0, :, :, -3:] = 3
    return vx.ScalarImage(data, affine=np.diag([-2.0, -1, 1, 1]))


def plane_of(figure, number):
    axes = figure.axes[number]
    return axes, np.asarray(axes.images[0].get_array())


def test_planes_are_turned_as_the_letters_say(marked):
    figure = marked.plot()
    assert [axes.get_title() for axes in figure.axes[:3]] == ["sagittal", "coronal", "axial"]
    for number, (right, up) in enumerate([("A", "S"), ("L", "S"), ("L", "A")]):
        axes, _ = plane_of(figure, number)
        letters = {text.get_text(): text.get_position() for text in axes.texts}
        assert letters[right][0] > 0.9
        assert letters[up][1] > 0.9
    axes, sagittal = plane_of(figure, 0)  # rows go from inferior to superior, columns from posterior to anterior
    assert (sagittal[-1] == 3).all()
    assert (sagittal[:-3, -1] == 2).all()
    assert sagittal[10, 0] == 0
    axes, axial = plane_of(figure, 2)  # columns go from left to right, and are shown the other way round
    assert axes.xaxis_inverted()
    assert (axial[-1] == 2).all()
    assert (axial[3:-3, -1] == 1).all()
    assert (axial[:-3, 0] == 0).all()
    assert (axial[:3] == 0).all()
    assert figure.axes[2].get_images()[0].get_extent() == [0, 40, 0, 30]  # millimetres


def test_planes_go_through_a_place_or_a_label():
    head = vx.datasets.HeadPhantom(32)
    place = np.argwhere(head.labels.data[0].numpy() == 7).mean(axis=0).round().astype(int)
    figure = head.plot(labels="labels", label=7)
    assert len(figure.axes) == 6
    assert 7 in {int(text.get_text()) for text in figure.legends[0].get_texts()}
    near = head.t1.plot(at=place.tolist())
    _, by_label = plane_of(figure, 2)
    _, by_place = plane_of(near, 2)
    assert by_label.shape == by_place.shape
    with pytest.raises(SizeError, match=r"at is \(99, 0, 0\)"):
        head.t1.plot(at=(99, 0, 0))
    with pytest.raises(SubjectError, match="no voxel has the label 77"):
        head.t1.plot(head.labels, label=77)


def test_labels_lie_on_top(tmp_path):
    head = vx.datasets.HeadPhantom(32)
    head.t1.plot(output=tmp_path / "plain.png")
    head.t1.plot(head.labels, output=tmp_path / "labels.png")
    plain, labelled = (matplotlib.image.imread(tmp_path / name)[..., :3] for name in ("plain.png", "labels.png"))
    colourful = [((picture.max(axis=2) - picture.min(axis=2)) > 0.2).mean() for picture in (plain, labelled)]
    assert colourful[0] < 0.02
    assert colourful[1] > 0.1


def test_only_the_planes_are_read(tmp_path):
    path = tmp_path / "scan.nii"
    vx.ScalarImage(torch.rand(1, 30, 30, 30)).save(path)
    image = vx.ScalarImage(path)
    image.plot()
    assert not image.is_loaded


def test_notebooks_show_pictures_and_text(tmp_path, monkeypatch):
    head = vx.datasets.HeadPhantom(32)
    assert "data:image/png;base64" in head.t1._repr_html_()
    shown = copy.copy(head)
    shown["name"] = "<b>odd</b>"
    assert "&lt;b&gt;odd" in shown._repr_html_()

    def missing():
        raise MissingDependencyError("no matplotlib")

    monkeypatch.setattr(planes, "require_matplotlib", missing)
    html = head._repr_html_()
    assert "data:image" not in html
    assert "ScalarImage(shape: (1, 32, 32, 32)" in html
    assert {"t1", "labels"} <= set(dir(head))


@pytest.mark.slow
def test_notebooks_show_batches_and_plans(monkeypatch):
    heads = [vx.datasets.HeadPhantom(16, seed=number) for number in range(6)]
    shown = vx.SubjectsBatch.from_subjects(heads)._repr_html_()
    assert shown.count("data:image/png;base64") == 8
    assert "<b>3 labels</b>" in shown
    assert "and 2 more" in shown
    plan = vx.plan(torch.nn.Conv3d(1, 2, 1), heads[0].t1, 8)
    assert "data:image/png;base64" in plan._repr_html_()
    assert "27 of 8 × 8 × 8" in plan._repr_html_()

    def missing():
        raise MissingDependencyError("no matplotlib")

    monkeypatch.setattr(planes, "require_matplotlib", missing)
    monkeypatch.setattr(plans, "require_matplotlib", missing)
    assert "data:image" not in plan._repr_html_() + vx.SubjectsBatch.from_subjects(heads)._repr_html_()


def test_what_is_open_while_a_plan_runs_is_drawn(tmp_path):
    model = torch.nn.Conv3d(1, 4, 1)
    plan = vx.plan(model, torch.zeros(1, 200, 160, 120), 64, reduce="argmax", memory_limit="60MiB")
    assert plan.num_blocks > 1
    curve, _ = plan.plot(output=tmp_path / "plan.png").axes
    assert (tmp_path / "plan.png").stat().st_size > 10_000
    (dashed,) = {tuple(line.get_ydata()) for line in curve.lines if line.get_linestyle() == "--"}
    most = max(plan.traversal.open_voxels(block) for block in plan.blocks) * 4 * 4 / 2**20
    assert dashed == pytest.approx((most, most))

    def states(at):
        values = np.concatenate([np.ravel(mesh.get_array()) for mesh in plan.plot(at=at).axes[1].collections])
        return [int((values == number).sum()) for number in range(3)]

    first, middle, last = states(0), states(0.5), states(1)
    assert first[0] == 0 < first[2]
    assert min(middle) > 0
    assert last[2] == 0 < last[0]
    with pytest.raises(ModeError, match="at is 2"):
        plan.plot(at=2)


def test_open_sums_of_outputs_of_several_sizes_are_added(tmp_path):
    def model(batch):
        return {"same": batch, "half": torch.nn.functional.avg_pool3d(batch, 2).repeat(1, 16, 1, 1, 1)}

    scale = {"same": 1, "half": 0.5}
    plan = vx.plan(model, torch.zeros(1, 48, 40, 32), 16, output_scale=scale)
    (most,) = {line.get_ydata()[0] for line in plan.plot().axes[0].lines if line.get_linestyle() == "--"}
    joining = plan.joining(plan.traversal.whole)
    assert most == pytest.approx(joining.applied(plan.traversal).open_voxels(joining.block) * (4 + 16 * 4 / 8) / 2**20)


def test_nothing_prints_an_address():
    head = vx.datasets.HeadPhantom(32)
    sampler = vx.GridSampler(head, 16)
    batch = vx.SubjectsBatch.from_subjects([head])
    model = torch.nn.Conv3d(1, 2, 1)
    things = [
        head,
        head.t1,
        batch,
        batch.t1,
        sampler,
        vx.UniformSampler(16),
        vx.LabelSampler(16),
        vx.MixedSampler([(1, vx.UniformSampler(16))]),
        vx.GridAggregator(sampler),
        vx.PatchAggregator((32, 32, 32)),
        vx.SubjectsDataset([head]),
        vx.SubjectsLoader(sampler),
        vx.Queue([head], 4, 1, vx.UniformSampler(16)),
        vx.Predictor(model, 16),
        vx.plan(model, head.t1, 16),
        vx.ArraySource(np.zeros((4, 4, 4))),
        vx.Compose([]),
        vx.PatchGrid.cover((32,) * 3, (16,) * 3, (0,) * 3),
        vx.ModelSpec(),
        vx.Gaussian(),
        vx.Regions((1, 2)),
        vx.ZarrStore("out.zarr"),
        ProcessLauncher("cpu,cpu"),
    ]
    for thing in things:
        assert " object at 0x" not in repr(thing), repr(thing)
    assert "patches:" in repr(vx.plan(model, head.t1, 16))


@pytest.mark.parametrize("room", ["", ".inference", ".testing", ".integrations.dask", ".integrations.monai"])
def test_no_public_class_is_shown_by_its_address(room):
    module = importlib.import_module(f"voxloom{room}")
    classes = [each for each in (getattr(module, name) for name in module.__all__) if isinstance(each, type)]
    assert classes
    assert [each for each in classes if each.__repr__ is object.__repr__ and not getattr(each, "_is_protocol", False)] == []


@pytest.fixture
def page(tmp_path):
    head = vx.datasets.HeadPhantom((40, 36, 32))
    labels = (Label(0, "background"), Label(7, "lesion & <b>more</b>"), Label(9, "nothing"))
    write_report(tmp_path / "case.html", CaseReport("case <1>", head.t1, head.labels, "volume: all of it", 12.34, labels))
    return head, tmp_path / "case.html"


def test_a_report_says_how_much_there_is_of_each_label(page):
    head, path = page
    text = path.read_text()
    rows = re.findall(r"<td>(\d+)</td><td>([^<]*)</td><td class='number'>([\d,]+)</td><td class='number'>([\d.]+)</td>", text)
    found = {int(label): (name, int(count.replace(",", "")), float(volume)) for label, name, count, volume in rows}
    counts = head.labels.count_labels()
    assert {label: count for label, (_, count, _) in found.items()} == {**{n: c for n, c in counts.items() if n}, 9: 0}
    assert found[7][0] == "lesion &amp; &lt;b&gt;more&lt;/b&gt;"
    millilitres = np.prod(head.labels.spacing) / 1000
    assert all(volume == pytest.approx(count * millilitres, abs=0.01) for _, count, volume in found.values())
    assert "case &lt;1&gt;" in text
    assert "It took 12.3 s" in text
    assert text.count("data:image/png;base64,") == 1
    assert "http" not in text  # it needs nothing else


def test_scores_and_results_on_another_grid_have_pages_too(tmp_path):
    head = vx.datasets.HeadPhantom(32)
    for result in (vx.ScalarImage(torch.rand(2, 32, 32, 32), affine=head.t1.affine), vx.LabelMap(torch.ones(1, 8, 8, 8).int())):
        write_report(tmp_path / "case.html", CaseReport("case", head.t1, result, "", 1.0))
        assert "data:image/png" in (tmp_path / "case.html").read_text()
    write_index(tmp_path / "index.html", {"a & b": "sub/case.html"})
    assert "<a href='sub/case.html'>a &amp; b</a>" in (tmp_path / "index.html").read_text()


def test_a_report_opens_in_a_browser(page):
    browser = next((name for name in ("chromium", "google-chrome", "chromium-browser") if shutil.which(name)), None)
    if browser is None:
        pytest.skip("no browser of the Chromium family is installed")
    _, path = page
    shown = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", path.as_uri()]
    dom = subprocess.run(shown, capture_output=True, text=True, timeout=60, check=True).stdout
    assert "<td>lesion &amp; &lt;b&gt;more&lt;/b&gt;</td>" in dom
    assert dom.count("<tr>") == len(vx.datasets.HeadPhantom.names) + 1


# Drawings


def test_the_patches_that_a_plane_cuts_are_drawn():
    head = vx.datasets.HeadPhantom(32)
    sampler = vx.GridSampler(head, (16, 12, 8), (4, 4, 0))
    axes = vx.plot.grid(sampler, axis=0, index=20).axes[0]
    drawn = {(round(each.get_x() + 0.5), round(each.get_y() + 0.5), each.get_width(), each.get_height()) for each in axes.patches}
    expected = {(location.index[1], location.index[2], 12, 8) for location in sampler.grid}
    assert drawn == expected
    assert len(axes.patches) == len(expected)
    with pytest.raises(SizeError, match="index is 99"):
        vx.plot.grid(sampler, index=99)


def test_weights_that_are_drawn_sum_to_one():
    figure = vx.plot.weights(50, 20, 8)
    assert [axes.get_title() for axes in figure.axes] == ["crop", "average", "hann", "gaussian"]
    for axes in figure.axes:
        *patches, total = axes.lines
        assert np.allclose(total.get_ydata(), 1)
        summed = np.zeros(50)
        for line in patches:
            summed[line.get_xdata()] += line.get_ydata()
        assert np.allclose(summed, 1)


@pytest.mark.slow
def test_centres_are_drawn_where_they_fall_beside_how_often_they_should():
    head = vx.datasets.HeadPhantom(32)
    sampler = vx.LabelSampler(head, 4, "labels", {7: 1}, seed=0)
    plane, line = vx.plot.draws(sampler, count=3000).axes
    for places in plane.collections[0].get_offsets():
        assert head.labels.data[0, int(places[0]), int(places[1])].eq(7).any()
    drawn, exact = line.lines[0].get_ydata(), line.lines[1].get_ydata()
    assert exact.sum() == pytest.approx(1)
    assert np.abs(drawn - exact).max() < 0.05
    with pytest.raises(SubjectError, match="no subject"):
        vx.plot.draws(vx.UniformSampler(4))


def test_an_epoch_of_a_queue_is_drawn():
    heads = [vx.datasets.HeadPhantom(16, seed=number) for number in range(3)]
    mixing, _, waiting = vx.plot.queue(vx.Queue(heads, 6, 5, vx.UniformSampler(8), seed=0)).axes
    order = [patch.patch_location.subject_index for patch in vx.Queue(heads, 6, 5, vx.UniformSampler(8), seed=0)]
    assert mixing.collections[0].get_offsets()[:, 1].tolist() == order
    assert (np.diff(waiting.lines[0].get_ydata()) >= 0).all()


def test_a_prediction_is_drawn_beside_the_truth(tmp_path):
    head = vx.datasets.HeadPhantom(32)
    figure = vx.plot.compare(head.t1, vx.ScalarImage(head.labels.data, affine=head.t1.affine), head.labels, 7, tmp_path / "a.png")
    assert (tmp_path / "a.png").exists()
    assert [axes.get_title().split()[0] for axes in figure.axes[::3]] == ["image", "predicted", "truth"]
    assert np.array_equal(plane_of(figure, 3)[1], plane_of(figure, 6)[1])
    with pytest.raises(SizeError, match="give them on one grid"):
        vx.plot.compare(head.t1, vx.LabelMap(torch.zeros(1, 8, 8, 8)), head.labels)

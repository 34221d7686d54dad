"""What the commands do, once it is known what was asked for."""

from collections.abc import Iterable
from pathlib import Path

import typer
from tqdm.auto import tqdm

from ..core.sizes import pretty_sizes
from ..datasets import HeadPhantom
from ..errors import MissingDependencyError, SaveError, VoxloomError
from ..io.labels import Label
from ..models.loading import load_model
from ..models.packing import pack_model
from ..models.spec import ModelSpec
from ..plotting.comparison import require_matplotlib, save_comparison
from ..plotting.report import CaseReport, write_report
from ..volumes.images.image import ScalarImage
from .applied import predictor_of
from .cases import make_folder
from .demo import run_demo
from .options import CaseOptions, ModelOptions
from .predicting import asked_of, cases_wanted, subject_of
from .reporting import Report
from .whole_way import run_whole_way

__all__ = ["describe", "pack", "plan_cases", "show"]


def plan_cases(
    options: ModelOptions,
    wanted: CaseOptions,
    report: Report,
) -> None:
    """Say what predicting would do."""
    cases = cases_wanted(wanted, options.model)
    predictor, model = predictor_of(options)
    failed = False
    for case in cases:
        try:
            subject = subject_of(case, model, predictor)
            found = predictor.plan(subject, **asked_of(wanted, subject, case))
            numbers = {
                "patches": found.num_patches,
                "forward_passes": found.forward_passes,
                "blocks": found.num_blocks,
                "peak_bytes": found.peak_bytes,
            }
            entry = {"case": case.name, "target": str(case.target), **numbers, "plan": found.to_json(), "text": str(found)}
            report.answer(f"{case.name}\n{found}\n" if len(cases) > 1 else str(found), entry)
        except Exception as error:  # noqa: BLE001 - see above
            report.failed(case.name, error, isinstance(error, VoxloomError | OSError))
            failed = True
    report.end()
    if failed:
        raise typer.Exit(1)


def describe(files: list[Path], allow_pickle: bool, report: Report) -> None:
    """Say what images and models are."""
    failed = False
    for path in files:
        try:
            lines = _description(path, allow_pickle)
            text = "\n".join([str(path), *(f"  {name + ':':<13}{value}" for name, value in lines.items())])
            report.answer(text, {"file": str(path), **lines})
        except VoxloomError as error:
            report.failed_file(path, error)
            failed = True
    report.end()
    if failed:
        raise typer.Exit(1)


def _description(path: Path, allow_pickle: bool) -> dict[str, str]:
    if path.suffix.lower() in (".pt2", ".pt", ".ts", ".pth"):
        loaded = load_model(str(path), allow_pickle=allow_pickle)
        least = loaded.least_batch_size()
        free = "any" if least == 1 else f"{least} or more"
        said = "none: raw intensities, native grid" if loaded.spec is None else str(loaded.spec).replace("\n", "\n  ")
        return {"batch size": str(loaded.batch_size or free), "patch size": pretty_sizes(loaded.patch_size), "spec": said}
    image = ScalarImage(path)
    size = image.memory / 2**20
    return {
        "shape": f"{image.spatial_shape}, {image.num_channels} channel{'s' if image.num_channels > 1 else ''}",
        "type": f"{image.dtype}, {size:.1f} MiB in memory".replace("torch.", ""),
        "spacing": f"({', '.join(f'{value:.4g}' for value in image.spacing)}) mm",
        "orientation": f"{''.join(image.orientation)}+",
        "origin": f"({', '.join(f'{value:.4g}' for value in image.origin)}) mm",
        "read": "in parts" if image.can_be_sliced else "as a whole",
    }


def pack(model: str, spec: Path, output: Path, weights: Path | None, allow_pickle: bool, overwrite: bool, report: Report) -> None:
    """Put a model and its spec into one file."""
    pack_model(model, ModelSpec.read(spec), output, weights, allow_pickle, overwrite)
    report.say(f"{output}: {model} with {spec}")


def show(image: Path | None, output: Path, size: int, patch_size: int, patch_overlap: int, overlap_mode: str, steps: int) -> None:
    """Apply a small network to an image as a whole and patch by patch, and show both; and train one, and predict with it."""
    _make_demo_folder(output, image)
    scan = HeadPhantom(size).t1 if image is None else ScalarImage(image)
    typer.echo(f"Input: {scan}")
    result = run_demo(scan, patch_size, patch_overlap, overlap_mode, output, _progress)
    typer.echo(f"Patches: {result.sampler}")
    picture = output / "result.png"
    title = f"{image.name if image else 'synthetic head'}: a network applied patch by patch, overlap mode '{overlap_mode}'"
    try:
        require_matplotlib()
        save_comparison(
            picture, result.image.data, result.whole, result.patched, result.sampler.grid, result.image.spacing, title
        )
        drawn = str(picture.resolve())
    except MissingDependencyError as error:
        drawn = f"none: {error}"
    typer.echo(
        f"Greatest difference between the whole and the patches: {result.greatest_difference:.3g}"
        f" (values reach {result.greatest_value:.4g})"
    )
    typer.echo(f"Model:   {result.model_file.resolve()}")
    typer.echo(f"Volume:  {(output / 'result.nii.gz').resolve()}\nPicture: {drawn}")
    overlap = ",".join(str(axis.patch - axis.stride) for axis in result.sampler.grid.axes)
    options = f"--overlap {overlap} --mode {overlap_mode} -o {output / 'again.nii.gz'}"
    typer.echo(f"Again:   voxloom predict {result.model_file} {result.image_file} {options}")
    if steps:
        _show_whole_way(output, steps)


def _make_demo_folder(output: Path, image: Path | None) -> None:
    """Make the folder of the demonstration, or use that of one before, whose files are replaced.

    Raises:
        SaveError: if other files might be.
    """
    mark = output / ".voxloom-demo"
    if image is not None and image.expanduser().resolve().parent == output.resolve():
        raise SaveError(f"{image} is in {output}, whose files are replaced: choose another folder with --output")
    if output.is_dir() and any(output.iterdir()) and not mark.exists():
        raise SaveError(
            f"{output} holds files that are not of a demonstration before, and might be replaced: choose an empty folder with"
            " --output"
        )
    make_folder(output)
    mark.touch()


def _show_whole_way(output: Path, steps: int) -> None:
    typer.echo(f"\nA small U-Net learns the labels of the synthetic head from {steps} batches of patches:")
    made = run_whole_way(output, steps, lambda batches, count: tqdm(batches, total=count, unit="batch"))
    typer.echo(f"Loss:    {made.losses[0]:.2f} at first, {made.losses[-1]:.2f} in the end")
    typer.echo(f"Plan for a scan that it has not seen:\n{made.plan}")
    found = ", ".join(f"{name} {score:.2f}" for name, score in made.dice.items())
    typer.echo(f"Dice of its labels: {found}")
    typer.echo(f"Model:   {made.model_file.resolve()}\nLabels:  {made.label_file.resolve()}")
    try:
        page = made.label_file.with_suffix("").with_suffix(".html")
        labels = [Label(value, name) for value, name in HeadPhantom.names.items()]
        scan = ScalarImage(made.scan_file)
        write_report(page, CaseReport("head", scan, made.labels, made.plan, made.seconds, labels))
        typer.echo(f"Page:    {page.resolve()}")
    except MissingDependencyError as error:
        typer.echo(f"Page:    none: {error}")
    typer.echo(f"Again:   voxloom predict {made.model_file} {made.scan_file} -o {output / 'again_labels.nii.gz'}")


def _progress(batches: Iterable) -> Iterable:
    return tqdm(batches, desc="Batches", unit="batch")

"""The command `voxloom`."""

import contextlib
import signal
import sys
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from tqdm import tqdm

from .._version import __version__
from ..core.sizes import pretty_sizes
from ..datasets import HeadPhantom
from ..errors import ModeError, SaveError, SizeError, VoxloomError
from ..inference import Predictor
from ..models.loading import LoadedModel, load_model
from ..models.packing import pack_model
from ..models.spec import ModelSpec
from ..plotting.comparison import require_matplotlib, save_comparison
from ..runs.log import left_behind
from ..volumes.image import ScalarImage
from ..volumes.subject import Subject
from .cases import Case, cases_of, cases_of_table
from .demo import FilterNetwork, run_demo
from .options import AllowPickle, ModelOptions, spread
from .others import cases_of_other

__all__ = ["app", "main"]

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _voxloom(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Cut 3-D medical images into patches, and weave a model's outputs back into whole volumes."""


RESULTS = Path("predictions")

Images = Annotated[
    list[Path] | None, typer.Argument(metavar="[IMAGE]...", help="Files, folders of files, or folders of a DICOM series.")
]
Table = Annotated[
    Path | None,
    typer.Option(
        help="Table (.csv, or .tsv with tabs) in place of images: a channel in each column, a name in 'case'; paths are"
        " relative to the table."
    ),
]
Mask = Annotated[Path | None, typer.Option(help="Image of where to compute; matched to each input by its affine.")]
Like = Annotated[Path | None, typer.Option(help="Image on whose grid the results are to be, in place of the input's own.")]
MaskAbove = Annotated[float | None, typer.Option(help="Compute only patches in which the input is above this value.")]


def _cases(images: list[Path] | None, table: Path | None, output: Path, model: str) -> list[Case]:
    if bool(images) == (table is not None):
        raise SizeError("give either images or a --table of cases")
    if table is not None:
        return cases_of_table(table, output)
    return cases_of_other(model, images or [], output) or cases_of(images or [], output)


def _mask(mask: Path | None, mask_above: float | None) -> Path | float | None:
    if mask is not None and mask_above is not None:
        raise ModeError("of --mask and --mask-above only one can be given")
    return mask if mask is not None else mask_above


# Commands


@app.command()
@spread
def predict(
    options: ModelOptions,
    images: Images = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="A .nii or .nii.gz for one image, or a folder.")] = RESULTS,
    table: Table = None,
    like: Like = None,
    mask: Mask = None,
    mask_above: MaskAbove = None,
    resume: Annotated[bool, typer.Option(help="Resume what was interrupted, or start over.")] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace results that are there.")] = False,
) -> None:
    """Apply a model to whole images, patch by patch, in bounded memory.

    What is interrupted goes on from there when the same command is given again; what is complete is left out.
    """
    cases = _cases(images, table, output, options.model)
    where = _mask(mask, mask_above)
    predictor, model = options.predictor()
    done, skipped, failed = 0, 0, []
    for case in cases:
        try:
            if _predict_case(predictor, _subject(case, model, predictor), case, like, where, resume, overwrite):
                done += 1
                _say(f"{case.name}: {case.target}")
            else:
                skipped += 1
                rest = left_behind(case.target)
                of_rest = "" if rest is None else f"; {rest} is left of a run that was interrupted: --overwrite resumes it"
                _say(f"{case.name}: {case.target} is complete{of_rest}")
        except KeyboardInterrupt:
            _say(f"{case.name}: interrupted; the same command goes on from what is finished", err=True)
            raise typer.Exit(130) from None
        except Exception as error:  # noqa: BLE001 - one case that fails, by whatever, must not stop the others
            failed.append(case.name)
            _say_failure(case, error)
    if len(cases) > 1:
        _say(f"{done} done, {skipped} complete already, {len(failed)} failed" + "".join(f"\n  {name}" for name in failed))
    if failed:
        raise typer.Exit(1)


def _say_failure(case: Case, error: Exception) -> None:
    if not isinstance(error, VoxloomError | OSError):
        traceback.print_exception(error)
    text = ". ".join([str(error) or type(error).__name__, *getattr(error, "__notes__", ())])
    _say(f"voxloom: {case.name} failed: {text}", err=True)


def _subject(case: Case, model: LoadedModel, predictor: Predictor) -> Subject:
    """Make a subject of a case, and check that a model takes as many channels."""
    subject = case.subject(predictor.spec.channels)
    channels = sum(image.num_channels for image in subject.images.values())
    if model.channels not in (None, channels):
        raise SizeError(
            f"{', '.join(map(str, case.files))} has {channels} channel{'s' if channels > 1 else ''}, but the model takes"
            f" {model.channels}: give as many, in one file or in the columns of a --table"
        )
    return subject


def _predict_case(
    predictor: Predictor, subject: Subject, case: Case, like: Path | None, mask: Any, resume: bool, overwrite: bool
) -> bool:
    """Predict a case, unless its result is there."""
    names = list(subject.images)
    _make_folder(case.target.parent)
    if not overwrite and predictor.is_made(subject, image_name=names, like=like, output=case.target, mask=mask):
        return False
    predictor(
        subject,
        image_name=names,
        output=case.target,
        like=like,
        mask=mask,
        resume=resume,
        overwrite=overwrite,
        progress=_printable(case.name),
    )
    return True


@app.command()
@spread
def plan(
    options: ModelOptions,
    images: Images = None,
    table: Table = None,
    like: Like = None,
    mask: Mask = None,
    mask_above: MaskAbove = None,
) -> None:
    """Say what predict would do, and how much memory it would take."""
    cases = _cases(images, table, RESULTS, options.model)
    where = _mask(mask, mask_above)
    predictor, model = options.predictor()
    failed = False
    for case in cases:
        try:
            subject = _subject(case, model, predictor)
            found = predictor.plan(subject, image_name=list(subject.images), like=like, mask=where, output=case.target)
            _say(f"{case.name}\n{found}\n" if len(cases) > 1 else str(found))
        except Exception as error:  # noqa: BLE001 - see above
            _say_failure(case, error)
            failed = True
    if failed:
        raise typer.Exit(1)


@app.command()
def info(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Images, or models (.pt2, TorchScript).")],
    allow_pickle: AllowPickle = False,
) -> None:
    """Say what an image or a model is; of an image only the header is read."""
    failed = False
    for path in files:
        try:
            _say(_description(path, allow_pickle))
        except VoxloomError as error:
            _say(f"voxloom: {error}", err=True)
            failed = True
    if failed:
        raise typer.Exit(1)


def _description(path: Path, allow_pickle: bool) -> str:
    if path.suffix.lower() in (".pt2", ".pt", ".ts", ".pth"):
        loaded = load_model(str(path), allow_pickle=allow_pickle)
        least = loaded.least_batch_size()
        free = "any" if least == 1 else f"{least} or more"
        lines = {"batch size": loaded.batch_size or free, "patch size": pretty_sizes(loaded.patch_size)}
        said = "none: raw intensities, native grid" if loaded.spec is None else str(loaded.spec).replace("\n", "\n  ")
        lines["spec"] = said
    else:
        image = ScalarImage(path)
        size = image.memory / 2**20
        lines = {
            "shape": f"{image.spatial_shape}, {image.num_channels} channel{'s' if image.num_channels > 1 else ''}",
            "type": f"{image.dtype}, {size:.1f} MiB in memory".replace("torch.", ""),
            "spacing": f"({', '.join(f'{value:.4g}' for value in image.spacing)}) mm",
            "orientation": f"{''.join(image.orientation)}+",
            "origin": f"({', '.join(f'{value:.4g}' for value in image.origin)}) mm",
            "read": "in parts" if image.can_be_sliced else "as a whole",
        }
    return "\n".join([str(path), *(f"  {name + ':':<13}{value}" for name, value in lines.items())])


@app.command()
def pack(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A .pt2 program, or with --weights package.module:factory.")],
    spec: Annotated[Path, typer.Option(help="What the model expects (.json).")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The .pt2 to write.")],
    weights: Annotated[Path | None, typer.Option(help="Weights for a factory: .safetensors, or a checkpoint.")] = None,
    allow_pickle: AllowPickle = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that is there.")] = False,
) -> None:
    """Put a model and what it expects into one file."""
    pack_model(model, ModelSpec.read(spec), output, weights, allow_pickle, overwrite)
    _say(f"{output}: {model} with {spec}")


@app.command()
def demo(
    image: Annotated[Path | None, typer.Option(help="Image to use in place of the synthetic head.")] = None,
    output: Annotated[Path, typer.Option(help="Folder to write to; it is made if need be.")] = Path("demo"),
    size: Annotated[int, typer.Option(help="Voxels of the synthetic head on each axis.", min=16)] = 160,
    patch_size: Annotated[int, typer.Option(help="Voxels of a patch on each axis.")] = 64,
    patch_overlap: Annotated[
        int, typer.Option(help="Voxels that neighbours share; twice the network's receptive radius makes 'crop' exact.")
    ] = 2 * FilterNetwork.receptive_radius,
    overlap_mode: Annotated[str, typer.Option(help="crop, average, hann or gaussian.")] = "crop",
) -> None:
    """Apply a small filter network to an image as a whole and patch by patch, and show that both give the same."""
    require_matplotlib()
    _make_folder(output)
    scan = HeadPhantom(size).t1 if image is None else ScalarImage(image)
    typer.echo(f"Input: {scan}")
    result = run_demo(scan, patch_size, patch_overlap, overlap_mode, output, _progress)
    typer.echo(f"Patches: {result.sampler}")
    picture = output / "result.png"
    title = f"{image.name if image else 'synthetic head'}: a network applied patch by patch, overlap mode '{overlap_mode}'"
    save_comparison(picture, result.image.data, result.whole, result.patched, result.sampler.grid, result.image.spacing, title)
    typer.echo(
        f"Greatest difference between the whole and the patches: {result.greatest_difference:.3g}"
        f" (values reach {result.greatest_value:.4g})"
    )
    typer.echo(f"Model:   {result.model_file.resolve()}")
    typer.echo(f"Volume:  {(output / 'result.nii.gz').resolve()}\nPicture: {picture.resolve()}")
    overlap = ",".join(str(axis.patch - axis.stride) for axis in result.sampler.grid.axes)
    options = f"--overlap {overlap} --mode {overlap_mode} -o {output / 'again.nii.gz'}"
    typer.echo(f"Again:   voxloom predict {result.model_file} {result.image_file} {options}")


def _say(text: str, err: bool = False) -> None:
    typer.echo(_printable(text), err=err)


def _printable(text: str) -> str:
    """Give a text without the bytes of names of files that are no text."""
    return text.encode("utf-8", "replace").decode()


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SaveError(f"the folder {path} cannot be made: {error.strerror}; give another one with --output") from error


def _progress(batches: Iterable) -> Iterable:
    return tqdm(batches, desc="Batches", unit="batch")


def main() -> None:
    """Run the command; an error that voxloom explains is printed without a traceback."""
    with _ended_cleanly():
        try:
            app()
        except (VoxloomError, OSError) as error:
            _say(f"voxloom: {error}", err=True)
            raise SystemExit(1) from None


@contextlib.contextmanager
def _ended_cleanly() -> Iterator[None]:
    """Let a scheduler end the command such that temporary files are removed; what was set before is restored."""
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)

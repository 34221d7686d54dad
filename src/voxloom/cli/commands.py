"""The command `voxloom`: what can be asked of it. What it does is imported when it is asked to: --help is there at once."""

import contextlib
import logging
import signal
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from .._version import __version__
from ..errors import ModeError, VoxloomError
from .options import AllowPickle, CaseOptions, ModelOptions, PartsOptions, numbers, spread
from .reporting import printable, reporting

__all__ = ["app", "main"]

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="markdown")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _voxloom(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing but errors and what was asked for.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say the plan of each case, and how long it took.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error comes from.")] = False,
) -> None:
    """Cut 3-D medical images into patches, and weave a model's outputs back into whole volumes."""
    if quiet and verbose:
        raise ModeError("of --quiet and --verbose only one can be given")
    reporting.quiet, reporting.debug = quiet, debug
    if verbose:
        logging.basicConfig(format="%(message)s")
    logging.getLogger("voxloom").setLevel(logging.INFO if verbose else logging.NOTSET)
    reporting.as_json = False
    reporting.entries.clear()


AsJson = Annotated[bool, typer.Option("--json", help="Print a list of JSON, an entry for each case, and nothing else.")]

PREDICT_EXAMPLES = """Examples:

    voxloom predict model.pt2 scan.nii.gz -o labels.nii.gz --labels

    voxloom predict model.pt2 scans/ -o out/ --memory-limit 4GiB

    voxloom predict my.models:UNet --weights best.safetensors scan.nii.gz -o out.nii.gz --patch-size 128

    voxloom predict nnunet:nnUNetTrainer__nnUNetPlans__3d_fullres scans/ -o out/

    voxloom predict monai:spleen_ct_segmentation scans/ -o out/

    voxloom predict model.pt2 big.ome.zarr -o big.ome.zarr/labels/organs --labels --shard $SLURM_ARRAY_TASK_ID/64
"""


@app.command(epilog=PREDICT_EXAMPLES)
@spread
def predict(
    options: ModelOptions,
    wanted: CaseOptions,
    parts: PartsOptions,
    resume: Annotated[bool, typer.Option(help="Resume what was interrupted, or start over.")] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace results that are there.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, as plan does, and do nothing.")] = False,
    as_json: AsJson = False,
    report: Annotated[
        bool, typer.Option("--report", help="Write a page (.html) beside each result: planes, volumes of labels, the plan.")
    ] = False,
) -> None:
    """Apply a model to whole images, patch by patch, in bounded memory.

    What is interrupted goes on from there when the same command is given again; what is complete is left out.
    """
    from .predicting import predict_cases
    from .work import plan_cases

    reporting.as_json = as_json
    if dry_run:
        plan_cases(options, wanted, reporting)
    else:
        predict_cases(options, wanted, parts, resume, overwrite, report, reporting)


@app.command(epilog="Example:\n\n    voxloom plan model.pt2 scan.nii.gz -o labels.nii.gz --memory-limit 2GiB\n")
@spread
def plan(
    options: ModelOptions,
    wanted: CaseOptions,
    as_json: AsJson = False,
) -> None:
    """Say what predict would do, and how much memory it would take."""
    from .work import plan_cases

    reporting.as_json = as_json
    plan_cases(options, wanted, reporting)


@app.command(epilog="Example:\n\n    voxloom info scan.nii.gz dicom_folder/ model.pt2\n")
def info(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Images, or models (.pt2, TorchScript).")],
    allow_pickle: AllowPickle = False,
    as_json: AsJson = False,
) -> None:
    """Say what an image or a model is; of an image only the header is read."""
    from .work import describe

    reporting.as_json = as_json
    describe(files, allow_pickle, reporting)


@app.command(epilog="Example:\n\n    voxloom pack my.models:UNet --weights best.safetensors --spec spec.json -o model.pt2\n")
def pack(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A .pt2 program, or with --weights package.module:factory.")],
    spec: Annotated[Path, typer.Option(help="What the model expects (.json).")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The .pt2 to write.")],
    weights: Annotated[Path | None, typer.Option(help="Weights for a factory: .safetensors, or a checkpoint.")] = None,
    allow_pickle: AllowPickle = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that is there.")] = False,
) -> None:
    """Put a model and what it expects into one file."""
    from . import work

    work.pack(model, spec, output, weights, allow_pickle, overwrite, reporting)


def _one_or_three(text: str | None, name: str) -> int | list[int] | None:
    found = numbers(text, int, name)
    return found[0] if found is not None and len(found) == 1 else found


@app.command(
    epilog="Examples:\n\n    voxloom convert scan.nii.gz -o scan.ome.zarr --chunks 64\n\n"
    "    voxloom convert scans/ -o zarr/ --format ome.zarr\n\n"
    "    voxloom convert organs.nii.gz -o scan.ome.zarr/labels/organs --labels\n"
)
def convert(
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Files, folders of files, DICOM or Zarr.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The file or Zarr folder for one image, or a folder.")],
    format: Annotated[  # noqa: A002 - as it is typed
        str | None, typer.Option(help="Format of results in a folder: ome.zarr, if none is given.", show_default=False)
    ] = None,
    labels: Annotated[
        bool, typer.Option("--labels", help="Coarser levels have the label of most voxels, not their mean.")
    ] = False,
    chunks: Annotated[str | None, typer.Option(help="Voxels of a chunk of Zarr: a number, or three such as 64,64,32.")] = None,
    shards: Annotated[str | None, typer.Option(help="Voxels of a shard, made of whole chunks.")] = None,
    levels: Annotated[int | None, typer.Option(help="Number of levels of OME-Zarr.")] = None,
    ome_version: Annotated[str | None, typer.Option(help="Version of OME-Zarr: 0.4, 0.5 or 0.6.  \\[default: 0.5]")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write images in another format: NIfTI, OME-Zarr, NIfTI-Zarr, or what ITK reads. Voxels and affine stay as they are."""
    from .stores import convert_cases

    reporting.as_json = as_json
    options = {
        "labels": labels or None,
        "chunks": _one_or_three(chunks, "chunks"),
        "shards": _one_or_three(shards, "shards"),
        "levels": levels,
        "version": ome_version,
    }
    convert_cases(images, output, format, overwrite, options, reporting)


@app.command(
    epilog="Examples:\n\n    voxloom split labels.nii.gz -o organs/\n\n"
    "    voxloom predict model.pt2 ct.nii.gz -o out/ --per-label\n"
)
def split(
    image: Annotated[Path, typer.Argument(metavar="LABELS", help="A label map.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="A new folder.")],
    format: Annotated[str, typer.Option(help="Format of the files.")] = "nii.gz",  # noqa: A002 - as it is typed
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a folder that this command made before.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write a file for each label of a label map: 1 where it is, 0 elsewhere; and a table of what they mean."""
    from . import labels

    reporting.as_json = as_json
    labels.split(image, output, format, overwrite, reporting)


@app.command(epilog="Example:\n\n    voxloom index labels.ome.zarr --patch-size 96 --classes 0,1,2\n")
def index(
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Label maps, or maps of weights.")],
    patch_size: Annotated[str, typer.Option(help="Voxels of the patches that will be drawn: a number, or three.")],
    classes: Annotated[str | None, typer.Option(help="Classes that will be drawn from.  \\[default: all above 0]")] = None,
    weighted: Annotated[bool, typer.Option("--weighted", help="The map says how probable each voxel is.")] = False,
    border: Annotated[str, typer.Option(help="exclude or clamp, as the sampler has it.")] = "exclude",
    as_json: AsJson = False,
) -> None:
    """Go through large maps once, and keep what samplers need of them beside the files, so that training starts at once."""
    from .stores import index_labels

    reporting.as_json = as_json
    size = _one_or_three(patch_size, "patch-size")
    index_labels(images, size, numbers(classes, int, "classes"), weighted, border, reporting)


@app.command(epilog="Example:\n\n    voxloom cache my.project:dataset -o /fast/cache --size-limit 200GiB\n")
def cache(
    dataset: Annotated[
        str, typer.Argument(metavar="DATASET", help="package.module:name of a data set, or a function that makes it.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the cache; it is made if need be.")],
    size_limit: Annotated[str | None, typer.Option(help="What the folder may take, such as 200GiB.")] = None,
    prune: Annotated[
        bool, typer.Option("--prune", help="Remove the entries of other data sets and of former transforms.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Preprocess the subjects of a data set, and keep them: Queue(dataset, ..., cache=FOLDER) then reads only patches."""
    from .stores import keep_subjects

    reporting.as_json = as_json
    keep_subjects(dataset, output, size_limit, prune, reporting)


@app.command(epilog="Example:\n\n    voxloom status out.ome.zarr\n")
def status(
    outputs: Annotated[list[Path], typer.Argument(metavar="RESULT...", help="What predict writes, or a folder of that.")],
    picture: Annotated[Path | None, typer.Option(help="Draw which parts of a volume are done (.png).")] = None,
    as_json: AsJson = False,
) -> None:
    """Say how far predictions are, from their logs."""
    from .stores import tell_status

    reporting.as_json = as_json
    tell_status(outputs, picture, reporting)


@app.command(epilog="Example:\n\n    voxloom retry out.ome.zarr\n")
def retry(
    outputs: Annotated[list[Path], typer.Argument(metavar="RESULT...", help="Results of which parts failed, or their folder.")],
) -> None:
    """Forget which parts of a prediction failed, so that whoever computes it next tries them again."""
    from .stores import try_again

    try_again(outputs, reporting)


@app.command()
def demo(
    image: Annotated[Path | None, typer.Option(help="Image to use in place of the synthetic head.")] = None,
    output: Annotated[Path, typer.Option(help="Folder to write to; it is made if need be.")] = Path("demo"),
    size: Annotated[int, typer.Option(help="Voxels of the synthetic head on each axis.", min=16)] = 160,
    patch_size: Annotated[int, typer.Option(help="Voxels of a patch on each axis.")] = 64,
    patch_overlap: Annotated[
        int, typer.Option(help="Voxels that neighbours share; twice the network's receptive radius, 5, makes 'crop' exact.")
    ] = 10,
    overlap_mode: Annotated[str, typer.Option(help="crop, average, hann, gaussian or nnunet.")] = "crop",
    steps: Annotated[int, typer.Option(help="Batches that a small U-Net learns from; 0 leaves it out.", min=0)] = 240,
) -> None:
    """Show that a filter network gives the same patch by patch as for the whole; then train a U-Net, and label a scan with it."""
    from .work import show

    show(image, output, size, patch_size, patch_overlap, overlap_mode, steps)


def main() -> None:
    """Run the command; an error that voxloom explains is printed without a traceback."""
    with _ended_cleanly():
        try:
            app()
        except (VoxloomError, OSError) as error:
            if reporting.debug:
                traceback.print_exception(error)
            typer.echo(printable(f"voxloom: {error}"), err=True)
            raise SystemExit(1) from None


@contextlib.contextmanager
def _ended_cleanly() -> Iterator[None]:
    """Let a scheduler end the command such that temporary files are removed; what was set before is restored."""
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)

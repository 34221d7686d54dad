"""The command `voxloom`: what can be asked of it. What it does is imported when it is asked to: --help is there at once."""

import contextlib
import signal
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from .._version import __version__
from ..errors import VoxloomError
from .options import AllowPickle, CaseOptions, ModelOptions, spread
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
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error comes from.")] = False,
) -> None:
    """Cut 3-D medical images into patches, and weave a model's outputs back into whole volumes."""
    reporting.quiet, reporting.debug = quiet, debug
    reporting.as_json = False
    reporting.entries.clear()


AsJson = Annotated[bool, typer.Option("--json", help="Print a list of JSON, an entry for each case, and nothing else.")]

PREDICT_EXAMPLES = """Examples:

    voxloom predict model.pt2 scan.nii.gz -o labels.nii.gz --labels

    voxloom predict model.pt2 scans/ -o out/ --memory-limit 4GiB

    voxloom predict my.models:UNet --weights best.safetensors scan.nii.gz -o out.nii.gz --patch-size 128

    voxloom predict nnunet:nnUNetTrainer__nnUNetPlans__3d_fullres scans/ -o out/

    voxloom predict monai:spleen_ct_segmentation scans/ -o out/
"""


@app.command(epilog=PREDICT_EXAMPLES)
@spread
def predict(
    options: ModelOptions,
    wanted: CaseOptions,
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
    from .work import plan_cases, predict_cases

    reporting.as_json = as_json
    if dry_run:
        plan_cases(options, wanted, reporting)
    else:
        predict_cases(options, wanted, resume, overwrite, report, reporting)


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


@app.command()
def demo(
    image: Annotated[Path | None, typer.Option(help="Image to use in place of the synthetic head.")] = None,
    output: Annotated[Path, typer.Option(help="Folder to write to; it is made if need be.")] = Path("demo"),
    size: Annotated[int, typer.Option(help="Voxels of the synthetic head on each axis.", min=16)] = 160,
    patch_size: Annotated[int, typer.Option(help="Voxels of a patch on each axis.")] = 64,
    patch_overlap: Annotated[
        int, typer.Option(help="Voxels that neighbours share; twice the network's receptive radius, 5, makes 'crop' exact.")
    ] = 10,
    overlap_mode: Annotated[str, typer.Option(help="crop, average, hann or gaussian.")] = "crop",
) -> None:
    """Apply a small filter network to an image as a whole and patch by patch, and show that both give the same."""
    from .work import show

    show(image, output, size, patch_size, patch_overlap, overlap_mode)


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

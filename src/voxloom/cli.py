"""The command `voxloom`."""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer
from tqdm import tqdm

from . import plot
from ._version import __version__
from .datasets import HeadPhantom
from .demo import FilterNetwork, run_demo
from .errors import SaveError, VoxloomError
from .volumes.image import ScalarImage

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
    plot.require_matplotlib()
    _make_folder(output)
    scan = HeadPhantom(size).t1 if image is None else ScalarImage(image)
    typer.echo(f"Input: {scan}")
    result = run_demo(scan, patch_size, patch_overlap, overlap_mode, _progress)
    typer.echo(f"Patches: {result.sampler}")
    volume, picture = output / "result.nii.gz", output / "result.png"
    scan.new_like(result.woven).save(volume)
    title = f"{image.name if image else 'synthetic head'}: a network applied patch by patch, overlap mode '{overlap_mode}'"
    plot.save_comparison(picture, result.image.data, result.whole, result.woven, result.sampler.grid, result.image.spacing, title)
    typer.echo(
        f"Greatest difference between the whole and the patches: {result.greatest_difference:.3g}"
        f" (values reach {result.greatest_value:.4g})"
    )
    typer.echo(f"Volume:  {volume.resolve()}\nPicture: {picture.resolve()}")


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SaveError(f"the folder {path} cannot be made: {error.strerror}; give another one with --output") from error


def _progress(batches: Iterable) -> Iterable:
    return tqdm(batches, desc="Batches", unit="batch")


def main() -> None:
    """Run the command; an error that voxloom explains is printed without a traceback."""
    try:
        app()
    except VoxloomError as error:
        typer.echo(f"voxloom: {error}", err=True)
        raise SystemExit(1) from None

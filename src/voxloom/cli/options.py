"""What several commands have in common: options for a model, and how it is applied. Nothing that takes long is imported here."""

import dataclasses
import enum
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

import typer

from ..errors import ModeError, SizeError

__all__ = ["AllowPickle", "CaseOptions", "ModelOptions", "PartsOptions", "numbers", "spread"]


class Activation(enum.StrEnum):
    """Activations by name."""

    softmax = "softmax"
    sigmoid = "sigmoid"


AllowPickle = Annotated[bool, typer.Option("--allow-pickle", help="Let files of models run the code that they bring.")]


@dataclass(frozen=True)
class ModelOptions:
    """A model, and how it is applied, as it was said on the command line."""

    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A .pt2 program, a TorchScript file, package.module:callable, or, with --weights, a factory; nnunet:FOLDER is a"
            " trained nnU-Net, and monai:FOLDER a bundle.",
        ),
    ]
    spec: Annotated[
        Path | None,
        typer.Option(help="What the model expects (.json).  \\[default: what is in or beside its file]", show_default=False),
    ] = None
    weights: Annotated[Path | None, typer.Option(help="Weights for a factory: .safetensors, or a checkpoint.")] = None
    allow_pickle: AllowPickle = False
    allow_code: Annotated[
        bool, typer.Option("--allow-code", help="Let MONAI evaluate the expressions in a bundle's configuration.")
    ] = False
    folds: Annotated[str | None, typer.Option(help="Folds of a trained nnU-Net, such as 0,1.  \\[default: all]")] = None
    checkpoint: Annotated[
        str | None,
        typer.Option(
            help="File of weights of each fold of a nnU-Net, or of a bundle.  \\[default: checkpoint_final.pth, or model.pt]"
        ),
    ] = None
    patch_size: Annotated[
        str | None, typer.Option(help="Voxels of a patch: a number, or three such as 160,160,64; -1 is all of an axis.")
    ] = None
    overlap: Annotated[
        str | None, typer.Option(help="What neighbours share: a fraction of the patch, or a number of voxels.  \\[default: 0.5]")
    ] = None
    mode: Annotated[
        str | None,
        typer.Option(
            help="crop, average, hann, gaussian, nnunet or monai; or gaussian:0.25 for a standard deviation of that part of a"
            " patch.  \\[default: gaussian]"
        ),
    ] = None
    context: Annotated[
        str | None, typer.Option(help="Voxels around each patch that the model is given and does not predict.  \\[default: 0]")
    ] = None
    slice_axis: Annotated[int | None, typer.Option(help="Axis of the slices, for a 2-D model; patches are height,width.")] = None
    patch_spacing: Annotated[
        str | None, typer.Option(help="fixed, or even to spread the patches evenly, as nnU-Net does.  \\[default: fixed]")
    ] = None
    labels: Annotated[bool, typer.Option("--labels", help="Write the number of the largest channel, not all channels.")] = False
    threshold: Annotated[float | None, typer.Option(help="Write 1 where a channel is larger, else 0.")] = None
    channels: Annotated[str | None, typer.Option(help="Write these channels alone, such as 0,2.")] = None
    activation: Annotated[Activation | None, typer.Option(help="Act on each patch before patches are summed.")] = None
    batch_size: Annotated[
        int | None,
        typer.Option(
            help="Patches that the model is given at a time, at most.  \\[default: 1, or what a .pt2 was exported for]",
            show_default=False,
        ),
    ] = None
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1 or mps.  \\[default: where the weights are]", show_default=False)
    ] = None
    amp: Annotated[bool, typer.Option("--amp", help="Run the model in mixed precision.")] = False
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Type that the model is given.  \\[default: that of its weights, or the image's if it has none]",
            show_default=False,
        ),
    ] = None
    padding: Annotated[str | None, typer.Option(help="Pad the volume by half the overlap: edge, reflect, 0 ...")] = None
    mirror: Annotated[
        str | None,
        typer.Option(help="Mirror patches along these axes too, such as 0,1,2, and average; none where a model says so."),
    ] = None
    interpolation: Annotated[
        str | None,
        typer.Option(
            help="How scores get to another grid: linear or nearest, or three with commas, for each axis.  \\[default: linear]"
        ),
    ] = None
    memory_limit: Annotated[
        str | None, typer.Option(help="Memory beside the model's own, such as 2GiB.  \\[default: what is free]")
    ] = None


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
Output = Annotated[
    Path, typer.Option("--output", "-o", help="A .nii, .nii.gz, .seg.nrrd, .ome.zarr or .zarr for one image, or a folder.")
]
Format = Annotated[
    str | None,
    typer.Option(
        help="Format of results in a folder: nii.gz (if none is given), nii, seg.nrrd, ome.zarr, nii.zarr or zarr.",
        show_default=False,
    ),
]
Group = Annotated[
    bool | None,
    typer.Option(
        "--group/--no-group",
        help="Whether CASE_0000 and CASE_0001, or sub-01_T1w and sub-01_T2w, are channels of one case.",
        show_default=False,
    ),
]
ResampleTo = Annotated[
    str | None, typer.Option(help="Name of the channel onto whose grid the others are resampled, where they differ.")
]
PerLabel = Annotated[
    bool, typer.Option("--per-label", help="Write a file for each label as well, into a folder named after the case.")
]
LabelTable = Annotated[bool, typer.Option("--label-table", help="Write what labels mean as a table too (.tsv), as BIDS has it.")]


@dataclass(frozen=True)
class CaseOptions:
    """Which images a model is applied to, where, and where results go, as it was said on the command line."""

    images: Images = None
    output: Output = RESULTS
    format: Format = None
    table: Table = None
    group: Group = None
    resample_to: ResampleTo = None
    like: Like = None
    mask: Mask = None
    mask_above: MaskAbove = None
    per_label: PerLabel = False
    label_table: LabelTable = False

    def check(self) -> None:
        """Check that what was given goes together.

        Raises:
            ModeError: if it does not.
        """
        if self.mask is not None and self.mask_above is not None:
            raise ModeError("of --mask and --mask-above only one can be given")

    @property
    def where(self) -> Path | float | None:
        """The mask, or the threshold that stands for one."""
        return self.mask if self.mask is not None else self.mask_above


Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class PartsOptions:
    """How a prediction is spread over processes or machines, as it was said on the command line."""

    shard: Annotated[
        str | None,
        typer.Option(help="Compute share I of N, such as 0/8: for jobs of an array, in any order.", show_default=False),
    ] = None
    dask: Annotated[
        str | None,
        typer.Option(help="Compute on a cluster: the address of a Dask scheduler, local:N or slurm:N.", show_default=False),
    ] = None
    devices: Annotated[
        str | None,
        typer.Option(help="Compute on several devices, a process each: all, or such as 0,1,2 or cpu,cpu.", show_default=False),
    ] = None
    shard_size: Annotated[
        str | None,
        typer.Option(help=r"Voxels of a part, a number or three.  \[default: about four patches]", show_default=False),
    ] = None

    @property
    def is_given(self) -> bool:
        """Whether it is spread at all."""
        return any(each is not None for each in (self.shard, self.dask, self.devices))

    def check(self) -> None:
        """Check that what was given goes together.

        Raises:
            ModeError: if it does not.
        """
        if sum(each is not None for each in (self.shard, self.dask, self.devices)) > 1:
            raise ModeError("of --shard, --dask and --devices only one can be given")
        if self.shard_size is not None and not self.is_given:
            raise ModeError("--shard-size was given, which is for --shard, --dask and --devices: leave it out")


def numbers(text: str | None, convert: Callable[[str], Number], name: str) -> list[Number] | None:
    """Read numbers with commas between them; None where nothing was given.

    Raises:
        SizeError: if they are none.
    """
    if text is None:
        return None
    try:
        return [convert(part.strip()) for part in text.split(",")]
    except ValueError as error:
        raise SizeError(f"--{name} is {text!r}: give a number, or several with commas between them") from error


def spread(command: Callable[..., None]) -> Callable[..., None]:
    """Let a command whose first parameters are dataclasses take the fields of those, each as a parameter of its own."""
    kinds: dict[str, Any] = {name: hint for name, hint in get_type_hints(command).items() if dataclasses.is_dataclass(hint)}
    fields = {name: [each.name for each in dataclasses.fields(kind)] for name, kind in kinds.items()}
    (model, *options), *others = (_parameters(kind) for kind in kinds.values())
    own = [each for name, each in inspect.signature(command).parameters.items() if name not in kinds]
    # First what has no name of its own: the model, and the images.
    parameters = [model, *(each for other in others for each in other), *own, *options]

    @functools.wraps(command)
    def taking_all(**given: Any) -> None:
        made = {name: kind(**{each: given[each] for each in fields[name]}) for name, kind in kinds.items()}
        command(**made, **{each.name: given[each.name] for each in own})

    taking_all.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    taking_all.__annotations__ = {each.name: each.annotation for each in parameters}
    return taking_all


def _parameters(kind: Any) -> list[inspect.Parameter]:
    hints = get_type_hints(kind, include_extras=True)
    return [
        inspect.Parameter(
            each.name,
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
            default=inspect.Parameter.empty if each.default is dataclasses.MISSING else each.default,
            annotation=hints[each.name],
        )
        for each in dataclasses.fields(kind)
    ]

"""Models from files and from code. What would run code that a file brings is refused, unless that is allowed."""

import copy
import importlib
import inspect
import os
import pickle
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from ..errors import MissingDependencyError, ModelFileError
from ..io.arrays.memory import hash_of, raw_bytes
from ..io.code import find_modules_here
from ..io.files import hash_of_path
from ..io.formats import format_of
from ..io.protocols import VolumeSource
from .guards import Guards
from .program_check import ProgramRefusedError, inspected, is_program
from .spec import ModelSpec, spec_beside

__all__ = ["LoadedModel", "Preceding", "as_loaded", "load_model", "load_weights"]

# Where checkpoints keep the weights, beside the state of an optimiser and the like.
STATE_KEYS = ("state_dict", "model_state_dict", "model", "network_weights")
# Name of the spec among the extra files of a program.
SPEC_FILE = "voxloom.json"
ALLOW = "it would run code from the file: give --allow-pickle if you trust where it is from"


class Preceding(Protocol):
    """What comes before a model, and gives it more channels."""

    def found(self, image: VolumeSource, options: Mapping[str, Any]) -> VolumeSource:
        """Give what comes before, labels on the image's own grid.

        Args:
            image: the image, with its channels in the order of the spec.
            options: how models are run: the keywords of `Predictor` that are not a matter of one model.
        """
        ...

    def added(self, image: VolumeSource, found: VolumeSource, made: Any) -> VolumeSource:
        """Give the input of a model with what comes before it.

        Args:
            image: see above.
            found: what came before.
            made: the input that the model's spec makes of the image.
        """
        ...


@dataclass(frozen=True)
class LoadedModel:
    """A model, and the sizes that it is fixed to; None for any size."""

    model: Any
    """What can be called, or several of an ensemble."""
    name: str | None = None
    """By what it is known: the hash of its file, or of the code and the weights. None for what was unpickled."""
    batch_size: int | None = None
    patch_size: tuple[int | None, ...] = (None, None, None)
    channels: int | None = None
    guards: Guards | None = None
    """What an exported program demands of its batches, unless it may do whatever it wants."""
    spec: ModelSpec | None = None
    """What it expects, if it came with that."""
    preceding: Preceding | None = None
    """What comes before it, of a cascade."""
    reduce: Any = None
    """What is made of its scores, where that is more than a spec can say."""
    program: "ProgramFile | None" = None
    """The file that it is in, which another process loads again: programs cannot be pickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        values = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "program"}
        if self.program is None or self.program.module is not self.model:
            return partial(type(self), **values), ()
        without = {name: value for name, value in values.items() if name not in ("model", "guards")}
        return partial(_loaded_again, self.program.checked(), **without), ()

    def __copy__(self) -> Self:
        return replace(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return replace(self, **{each.name: copy.deepcopy(getattr(self, each.name), memo) for each in fields(self)})

    def least_batch_size(self, patch_size: Sequence[int] | None = None) -> int:
        """Give the batch size that it is fixed to, or else the smallest that it was made for."""
        free = 1 if self.guards is None else self.guards.least_batch_size(patch_size)
        return free if self.batch_size is None else self.batch_size

    def check_sizes(self, batch_size: int, patch_size: Sequence[int]) -> None:
        """Check sizes of batches.

        Raises:
            SizeError: if the model was exported for others.
        """
        if self.guards is not None:
            self.guards.check(torch.empty((batch_size, self.channels or 1, *patch_size), device="meta"))

    def takes_full_batches(self, patch_size: Sequence[int] | None = None) -> bool:
        """Whether it takes batches of some sizes only, so that the last one of a volume must be filled up."""
        return self.least_batch_size(patch_size) > 1


@dataclass(frozen=True)
class ProgramFile:
    """The file of a program, and what was loaded from it."""

    path: Path
    allow_pickle: bool
    """Whether it may run code that it brings."""
    module: Any

    def checked(self) -> "ProgramFile":
        """Give what another process loads, if that is what there is here.

        Raises:
            ModelFileError: if the weights have been changed since, or the file cannot be loaded any more.
        """
        again, here = (each.state_dict() for each in (_of_file(self.path, self.allow_pickle).model, self.module))
        if again.keys() != here.keys() or not all(torch.equal(value.cpu(), again[name]) for name, value in here.items()):
            raise ModelFileError(
                f"the model of {self.path} has other weights than its file, which other processes would load: save it in one"
                " of its own"
            )
        return replace(self, module=None)


def _loaded_again(program: ProgramFile, **values: Any) -> LoadedModel:
    again = _of_file(program.path, program.allow_pickle)
    if again.name != values["name"]:
        raise ModelFileError(f"{program.path} has been changed since it was loaded: begin again")
    return LoadedModel(**{**values, "model": again.model, "guards": again.guards, "program": again.program})


def as_loaded(model: Any) -> LoadedModel:
    """Give a model, whatever it was given as: loaded, the name of a file, or what can be called."""
    if isinstance(model, LoadedModel):
        return model
    if isinstance(model, list | tuple) and any(isinstance(each, LoadedModel | str | os.PathLike) for each in model):
        return _ensemble([as_loaded(each) for each in model])
    return load_model(os.fspath(model)) if isinstance(model, str | os.PathLike) else LoadedModel(model)


def _ensemble(models: Sequence[LoadedModel]) -> LoadedModel:
    """Make one of several, which must expect the same.

    Raises:
        ModelFileError: if they do not; says what differs.
    """
    first, *others = models
    for name in ("spec", "batch_size", "patch_size", "channels", "guards", "preceding", "reduce"):
        if any(getattr(each, name) != getattr(first, name) for each in others):
            what = "the sizes that they were exported for" if name == "guards" else name
            raise ModelFileError(f"the models of an ensemble must expect the same, but these differ in {what}: predict with each")
    names = [each.name for each in models]
    whole = None if None in names else " ".join(map(str, names))
    parts = [part for each in models for part in (each.model if isinstance(each.model, list | tuple) else [each.model])]
    return replace(first, model=parts, name=whole, program=None)


def load_model(name: str, weights: Path | None = None, allow_pickle: bool = False) -> LoadedModel:
    """Load a model.

    Args:
        name: a file, of `torch.export` (.pt2) or TorchScript; or `package.module:callable`, where with weights the callable makes
            the network, and without it is the model.
        weights: file of weights: `.safetensors`, or a checkpoint.
        allow_pickle: let files be unpickled, which runs code that they bring.

    Raises:
        ModelFileError: if the model cannot be loaded, or must not be.
    """
    path = Path(name).expanduser()
    weights = None if weights is None else Path(weights).expanduser()
    if path.exists():
        if weights is not None:
            raise ModelFileError(f"{path} holds its weights itself: weights are for package.module:factory")
        return _of_file(path, allow_pickle)
    if ":" not in name or name.endswith((".pt2", ".pt", ".ts", ".pth")):
        raise ModelFileError(f"there is no file {name}; a model is a .pt2 or TorchScript file, or package.module:callable")
    found = _imported(name)
    if weights is None:
        if isinstance(found, type):
            raise ModelFileError(f"{name} is a class, which makes networks: give its weights with --weights, or name a network")
        if not _takes_a_batch(found):
            raise ModelFileError(
                f"{name} takes no batch, and so is no model. If it makes a network, give its weights with --weights"
            )
        code = _name_of_code(name, found)
        return LoadedModel(found, f"{code} {_name_of_network(found)}" if isinstance(found, nn.Module) else code)
    try:
        network = found()
    except TypeError as error:
        raise ModelFileError(f"{name} cannot make a network: {error}. With weights it is called without arguments") from error
    if not isinstance(network, nn.Module):
        raise ModelFileError(f"{name} returned {type(network).__name__}: with weights it must make a torch.nn.Module")
    load_weights(network, weights, allow_pickle)
    name_of_both = f"{_name_of_code(name, found)} {_name_of_network(network)}"
    return LoadedModel(network.eval(), name_of_both, spec=spec_beside(weights))


def _name_of_code(name: str, found: Callable) -> str:
    """Know a function, class or object by the source file that it is in."""
    kind = found if inspect.isroutine(found) or isinstance(found, type) else type(found)
    try:
        path = inspect.getsourcefile(kind)
    except TypeError:  # it is built in
        path = None
    return f"{name} sha256 {'' if path is None else hash_of_path(Path(path))}"


def _name_of_network(network: nn.Module) -> str:
    state = sorted(network.state_dict().items())
    return hash_of([repr(network), *(part for key, value in state for part in (key, raw_bytes(value)))])


def _takes_a_batch(function: Callable) -> bool:
    try:
        inspect.signature(function).bind(None)
    except TypeError:
        return False
    except ValueError:
        pass  # a built-in function that does not say what it takes
    return True


def _imported(name: str) -> Any:
    module_name, _, attribute = name.partition(":")
    find_modules_here()
    try:
        found = importlib.import_module(module_name)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        plain = module_name.removesuffix(".py").replace("/", ".")
        hint = f": write {plain}:{attribute}, without .py" if plain != module_name else ""
        raise ModelFileError(
            f"{name} cannot be imported: {error}. It is looked for here, and where packages are installed{hint}"
        ) from error
    except Exception as error:  # whatever the module does when it is imported
        raise ModelFileError(f"{name} cannot be imported, for it fails with {type(error).__name__}: {error}") from error
    if not callable(found):
        raise ModelFileError(f"{name} is of type {type(found).__name__}, which cannot be called")
    return found


# Weights


def load_weights(network: nn.Module, path: Path, allow_pickle: bool) -> None:
    """Read weights into a network: of a file of `.safetensors`, or of a checkpoint, whatever wraps the names.

    Raises:
        ModelFileError: if there is no such file, or it does not fit, or holds more than weights.
    """
    state = _state_of(path, allow_pickle)
    while not set(state) & set(network.state_dict()) and (shorter := _without_prefix(state)) is not state:
        state = shorter
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise ModelFileError(f"the weights in {path} do not fit {type(network).__name__}: {error}") from error


def _state_of(path: Path, allow_pickle: bool) -> Mapping[str, Tensor]:
    if not path.is_file():
        raise ModelFileError(f"there is no file of weights {path}")
    if path.suffix == ".safetensors":
        try:
            from safetensors import SafetensorError
            from safetensors.torch import load_file
        except ImportError as error:
            raise MissingDependencyError(f"{path} needs safetensors: pip install 'voxloom[safetensors]'") from error
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ModelFileError(f"{path} is not a file of safetensors, or is damaged: {error}") from error
    found: Any = _unpickled(path, allow_pickle)
    while isinstance(found, Mapping) and (inner := [found[key] for key in STATE_KEYS if isinstance(found.get(key), Mapping)]):
        found = inner[0]
    if not isinstance(found, Mapping) or not all(isinstance(key, str) and isinstance(found[key], Tensor) for key in found):
        raise ModelFileError(f"{path} holds no weights by name, also not under {', '.join(STATE_KEYS)}")
    return found


def _without_prefix(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Drop what a wrapper such as DistributedDataParallel or torch.compile puts before all names, if there is such a thing."""
    for prefix in ("module.", "_orig_mod."):
        if state and all(name.startswith(prefix) for name in state):
            return {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def _unpickled(path: Path, allow_pickle: bool) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old ways to pickle
            return torch.load(path, map_location="cpu", weights_only=not allow_pickle)
    except pickle.UnpicklingError as error:
        raise ModelFileError(f"{path} holds more than weights, and {ALLOW}. ({_first_line(error)})") from error
    except Exception as error:  # whatever a damaged file makes torch stumble over
        raise ModelFileError(f"{path} cannot be read: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


# Whole models


def _of_file(path: Path, allow_pickle: bool) -> LoadedModel:
    if path.is_dir():
        kinds = {"nnunet": "plans.json", "monai": "configs/metadata.json"}
        kind = next((kind for kind, file in kinds.items() if (path / file).is_file()), None)
        hint = f"it is one of {'nnU-Net' if kind == 'nnunet' else 'MONAI'}: write {kind}:{path}" if kind else ""
        rule = "a model is a .pt2 or TorchScript file, or package.module:callable"
        raise ModelFileError(f"{path} is a folder: {hint or rule}")
    if format_of(path) is not None:
        raise ModelFileError(f"{path} is an image, and no model: name the model first, and then the images")
    names: list[str] = []
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError) as error:
        if path.suffix == ".pt2":
            raise ModelFileError(f"{path} is damaged or truncated, or no torch.export program: {error}") from error
    if is_program(names):
        return _of_program(path, allow_pickle)
    if any(name.endswith("/constants.pkl") for name in names):
        if not allow_pickle:
            raise ModelFileError(f"{path} is TorchScript, whatever it is called, and {ALLOW}")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # of TorchScript as such
                model, spec = torch.jit.load(path, map_location="cpu").eval(), spec_beside(path)
                return LoadedModel(model, _name_of(path), spec=spec, program=ProgramFile(path.absolute(), True, model))
        except Exception as error:  # see above
            raise ModelFileError(f"{path} cannot be loaded as TorchScript: {_first_line(error)}") from error
    if not allow_pickle:
        raise ModelFileError(
            f"{path} is no torch.export program. If it is a pickled model, {ALLOW}; if it holds weights,"
            " give package.module:factory and --weights"
        )
    model = _unpickled(path, allow_pickle)
    if not callable(model):
        raise ModelFileError(
            f"{path} holds {type(model).__name__}, which cannot be called: give package.module:factory --weights"
        )
    return LoadedModel(model.eval() if isinstance(model, nn.Module) else model)


def _of_program(path: Path, allow_pickle: bool) -> LoadedModel:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.load(path if allow_pickle else inspected(path))
    except ProgramRefusedError as error:
        raise ModelFileError(f"{path}: {error}; {ALLOW}") from None
    except Exception as error:  # whatever a damaged file makes torch stumble over
        raise ModelFileError(f"{path} cannot be loaded: {_first_line(error)}") from error
    inputs = set(program.graph_signature.user_inputs)
    shapes = [node.meta["val"].shape for node in program.graph.nodes if node.op == "placeholder" and node.name in inputs]
    if len(shapes) != 1 or len(shapes[0]) not in (4, 5):
        raise ModelFileError(
            f"{path} takes {len(shapes)} inputs, of {', '.join(str(len(shape)) for shape in shapes)} dimensions: a model takes"
            " one batch (B, C, I, J, K), or one of slices (B, C, height, width)"
        )
    try:
        guards = None if allow_pickle else Guards(program, shapes[0])  # only what was looked into is arithmetic
    except ValueError as error:
        raise ModelFileError(
            f"{path}: {error}. Give --allow-pickle if you trust where it is from, and PyTorch makes its own checks"
        ) from error
    module = _module_of(program, guards)
    file = ProgramFile(path.absolute(), allow_pickle, module)
    found = LoadedModel(module, _name_of(path), spec=_spec_of(path), program=file)
    if len(shapes[0]) == 4:  # what it was exported for is a matter of which axis slices lie along, and of their neighbours
        return found
    batch, channels, *patch = (size if isinstance(size, int) else None for size in shapes[0])
    return replace(found, batch_size=batch, patch_size=tuple(patch), channels=channels, guards=guards)


def _spec_of(path: Path) -> ModelSpec | None:
    """Read the spec that a file of a program holds, or that lies beside it."""
    with zipfile.ZipFile(path) as archive:
        inside = [name for name in archive.namelist() if name.endswith(f"extra/{SPEC_FILE}")]
        if inside:
            return ModelSpec.from_json(archive.read(inside[0]), f"{SPEC_FILE} in {path}")
    return spec_beside(path)


def _module_of(program: torch.export.ExportedProgram, guards: Guards | None) -> nn.Module:
    if guards is None:
        return program.module()
    without = {"check_guards": False} if "check_guards" in inspect.signature(program.module).parameters else {}
    module = program.module(**without)
    module.register_forward_pre_hook(lambda module, args: guards.check(args[0]), prepend=True)
    return module


def _name_of(path: Path) -> str:
    """Know a model by its file, since not all of what it is can be seen once it is loaded."""
    return f"sha256 {hash_of_path(path)}"

"""The configuration of a bundle of MONAI: what is written in it, and classes with their arguments."""

import importlib
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import MissingDependencyError, ModelFileError
from ...io.protocols import Json

__all__ = ["CODE", "PREDICTION", "Component", "Configuration", "listed"]

CONFIGURATIONS = ("inference.json", "inference.yaml", "inference.yml", "evaluate.json")
# What starts the name of another part: a reference, and a macro, which is a copy of it.
REFERENCES = ("@", "%")
PREDICTION = "pred"
"""What MONAI's evaluators call the output of the network."""
CODE = "which is code: allow_code=True (--allow-code) lets MONAI evaluate it, if you trust where the bundle is from"


@dataclass(frozen=True)
class Configuration:
    """What a bundle's configuration says, and where."""

    path: Path
    content: Mapping[str, Any]
    parser: Any
    """MONAI's own, where code may be run; None where it may not."""

    @classmethod
    def read(cls, root: Path, name: str | None, allow_code: bool) -> "Configuration":
        """Read it from the bundle's folder.

        Args:
            root: the folder.
            name: name of the file in `configs`; None for the usual ones.
            allow_code: let MONAI evaluate expressions.

        Raises:
            ModelFileError: if there is none, or it is damaged.
        """
        folder = root / "configs"
        names = CONFIGURATIONS if name is None else (name,)
        path = next((folder / each for each in names if (folder / each).is_file()), None)
        if path is None:
            raise ModelFileError(f"there is no {folder / names[0]}: give the folder of a MONAI bundle, with configs and models")
        try:
            content = json.loads(path.read_text(encoding="utf-8")) if path.suffix == ".json" else _yaml(path)
        except (OSError, ValueError) as error:
            raise ModelFileError(f"{path} cannot be read: {error}") from error
        if not isinstance(content, Mapping):
            raise ModelFileError(f"{path} is no configuration: it must be an object with network_def, inferer and preprocessing")
        parser = None
        if allow_code:
            parser = importlib.import_module("monai.bundle").ConfigParser(dict(content))
            parser["bundle_root"] = str(root)
        return cls(path, content, parser)

    def get(self, name: str, above: tuple[str, ...] = ()) -> Any:
        """Give a part as it is written, by the names and numbers that lead there; None if there is none."""
        if name in above:
            raise ModelFileError(f"{name} in {self.path} refers to itself")
        found: Any = self.content
        for part in name.replace("::", "#").split("#"):
            if isinstance(found, list) and part.isdecimal() and int(part) < len(found):
                found = found[int(part)]
            elif isinstance(found, Mapping):
                found = found.get(part)
            else:
                return None
            if isinstance(found, str) and found.startswith(REFERENCES):
                reference, found = found, self.get(found[1:], (*above, name))
                if found is None:
                    raise ModelFileError(f"{name} in {self.path} refers to {reference!r}, which is not there")
        return found

    def value(self, name: str) -> Any:
        """Give a part as plain values: references are followed, and code is evaluated if that is allowed.

        Raises:
            ModelFileError: if it is code, or refers to what is not there.
        """
        return self._plain(self.get(name), name)

    def _plain(self, value: Any, name: str) -> Any:
        if isinstance(value, str) and value.startswith("$"):
            if self.parser is None:
                raise ModelFileError(f"{name} in {self.path} is {value!r}, {CODE}")
            return self.evaluated(name)
        if isinstance(value, str) and value.startswith(REFERENCES):
            return self.value(value[1:])
        if isinstance(value, Mapping):
            if "_target_" in value:
                raise ModelFileError(f"{name} in {self.path} is a {value['_target_']}, where a plain value is understood")
            return {key: self._plain(each, f"{name}#{key}") for key, each in value.items()}
        if isinstance(value, list):
            return [self._plain(each, f"{name}#{number}") for number, each in enumerate(value)]
        return value

    def evaluated(self, name: str) -> Any:
        """Let MONAI evaluate a part."""
        try:
            found = self.parser.get_parsed_content(name)
        except Exception as error:  # whatever the bundle's code raises
            raise ModelFileError(f"{name} in {self.path} cannot be evaluated: {type(error).__name__}: {error}") from error
        return found.tolist() if hasattr(found, "tolist") else found

    def component(self, name: str, needed: bool = True) -> "Component | None":
        """Give a part that is a class with its arguments."""
        found = self.get(name)
        if isinstance(found, Mapping) and "_target_" in found:
            return Component(self, name, str(found["_target_"]), [key for key in found if not key.startswith("_")])
        if needed:
            raise ModelFileError(f"{self.path} has no {name} with a _target_, as bundles of MONAI have it")
        return None

    def steps(self, name: str) -> list["Component"]:
        """Give the transforms of a part, in order; none where there is no such part."""
        if self.get(name) is None:
            return []
        transforms = self.get(f"{name}#transforms")
        if not isinstance(transforms, list):
            raise ModelFileError(f"{name} in {self.path} is no Compose with a list of transforms")
        found = []
        for number, each in enumerate(transforms):
            if isinstance(each, Mapping) and self.value(f"{name}#transforms#{number}#_disabled_") in (True, "true", "True"):
                continue
            component = self.component(f"{name}#transforms#{number}")
            assert component is not None
            found.append(component)
        return found


def _yaml(path: Path) -> Any:
    try:
        yaml = importlib.import_module("yaml")
    except ImportError as error:
        raise MissingDependencyError(f"{path} needs PyYAML: pip install pyyaml") from error
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ModelFileError(f"{path} is damaged: {error}") from error


@dataclass(frozen=True)
class Component:
    """A class of a configuration, with the names of the arguments that it is given."""

    configuration: Configuration
    place: str
    target: str
    arguments: list[str]

    @property
    def kind(self) -> str:
        """Name of the class, of a transform without what says that it takes a dictionary."""
        name = self.target.rpartition(".")[2]
        for ending in ("Dict", "d", "D"):
            if name.endswith(ending) and name not in ("Lambda",):
                return name.removesuffix(ending)
        return name

    def __getitem__(self, name: str) -> Any:
        if name not in self.arguments:
            self.refuse(f"its argument {name} is missing")
        return self.get(name)

    def get(self, name: str, default: Any = None) -> Any:
        """Give an argument as a plain value."""
        return self.configuration.value(f"{self.place}#{name}") if name in self.arguments else default

    def written(self, name: str) -> str:
        """Give an argument as it is written, without running code; nothing where it is left out or null."""
        found = self.configuration.get(f"{self.place}#{name}") if name in self.arguments else None
        return "" if found is None else str(found)

    def numbers(self, name: str, default: Any = None, may_be_none: bool = False) -> list[Any]:
        """Give an argument that is a number or a list of them, as a list."""
        found = listed(self[name] if default is None else self.get(name, default))
        for each in found or [found]:
            if not (may_be_none and each is None) and (not isinstance(each, int | float) or isinstance(each, bool)):
                self.refuse(f"its {name} is {each!r}, which is no number")
        return found

    def number(self, name: str) -> Any:
        """Give an argument that is a number; None where it is left out or null."""
        if self.get(name) is None:
            return None
        found = self.numbers(name)
        if len(found) != 1:
            self.refuse(f"its {name} is {found!r}, where one number is understood")
        return found[0]

    def own(self, name: str, default: Any = None) -> Any:
        """Give an argument that may be a list with a value for each key: that of the prediction."""
        value, keys = self.get(name, default), listed(self.get("keys", PREDICTION))
        if not isinstance(value, list):
            return value
        if len(value) != len(keys):
            self.refuse(f"its {name} has {len(value)} values for {len(keys)} keys")
        return value[keys.index(PREDICTION)]

    def only(self, *known: str) -> None:
        """Refuse arguments that are not understood.

        Raises:
            ModelFileError: names the first.
        """
        for name in self.arguments:
            if name not in (*known, "keys", "allow_missing_keys", "lazy"):
                self.refuse(f"its argument {name} is not understood")

    def warn(self, what: str) -> None:
        """Say what is done otherwise than by MONAI."""
        warnings.warn(f"{self.place} in {self.configuration.path}, {self.target}: {what}", RuntimeWarning, stacklevel=4)

    def refuse(self, why: str) -> None:
        """Say that it is not understood.

        Raises:
            ModelFileError: always.
        """
        raise ModelFileError(
            f"{self.place} in {self.configuration.path}, {self.target}: {why}. Write a spec for the network instead (ModelSpec),"
            " or run the bundle by MONAI, with VoxloomInferer in place of its inferer"
        )


def listed(value: Json) -> list[Any]:
    """Give a value that may be a list as one."""
    return list(value) if isinstance(value, list | tuple) else [value]

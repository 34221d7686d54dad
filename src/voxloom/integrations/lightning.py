"""Training with Lightning: loaders of patches that are resumed in mid-epoch, and validation on whole volumes."""

import importlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..errors import MissingDependencyError, QueueError, SubjectError
from ..inference.predictor import Predictor
from ..training.queue import Queue
from ..volumes.libraries import as_subject
from ..volumes.loading import SubjectsLoader
from ..volumes.subject import Subject

__all__ = ["PatchDataModule", "ResumeLoaders", "VolumeValidation", "dice"]


def _base(name: str) -> Any:
    """Give a class of Lightning's, by either of the package's names.

    Raises:
        MissingDependencyError: if it is not installed.
    """
    for package in ("lightning.pytorch", "pytorch_lightning"):
        try:
            return getattr(importlib.import_module(package), name)
        except ImportError:
            continue
    raise MissingDependencyError("this needs Lightning: pip install 'voxloom[lightning]'")


class PatchDataModule(_base("LightningDataModule")):  # type: ignore[misc]
    """Gives a `Trainer` batches of patches, and has its checkpoints resume with the very next one.

    Args:
        train: a `Queue`, a loader, or a function without arguments that makes one. In training with several processes it must be
            such a function: it is called when the processes know their ranks.
        val: the same for validation; a sampler or a data set will do. None for no validation, or for `VolumeValidation`.
        batch_size: patches in a batch, where a queue or a data set is given.
        val_batch_size: the same for validation; None for as many.
        **options: more arguments for the loaders, such as `device` and `batch_transform`; see `SubjectsLoader`.

    Example:
        >>> import voxloom as vx
        >>> from voxloom.integrations.lightning import PatchDataModule
        >>> subjects = [vx.datasets.HeadPhantom(32, seed=number) for number in range(2)]
        >>> queue = vx.Queue(subjects, max_length=8, samples_per_volume=4, sampler=vx.UniformSampler(16), seed=0)
        >>> data = PatchDataModule(queue, batch_size=4)
        >>> next(iter(data.train_dataloader())).t1.data.shape
        torch.Size([4, 1, 16, 16, 16])
    """

    def __init__(
        self, train: Any, val: Any = None, *, batch_size: int = 1, val_batch_size: int | None = None, **options: Any
    ) -> None:
        super().__init__()
        self._makers = {"train": train, "val": val}
        self._sizes = {"train": batch_size, "val": batch_size if val_batch_size is None else val_batch_size}
        self._options = options
        self._loaders: dict[str, Any] = {}
        self._state: Mapping[str, Any] | None = None

    def __repr__(self) -> str:
        shown = {which: getattr(made, "__qualname__", made) for which, made in self._makers.items()}  # functions by their name
        return f"PatchDataModule(train={shown['train']}, val={shown['val']})"

    def _loader(self, which: str) -> Any:
        if which not in self._loaders:
            made = self._makers[which]
            made = made() if callable(made) and not hasattr(made, "__iter__") else made
            is_loader = isinstance(made, torch.utils.data.DataLoader)
            loader: Any = made if is_loader else SubjectsLoader(made, batch_size=self._sizes[which], **self._options)
            if which == "train" and hasattr(loader, "state_dict"):
                # Lightning asks it as well, and goes by that after all.
                loader.state_dict = partial(self._state_of, loader)
            self._loaders[which] = loader
        return self._loaders[which]

    def train_dataloader(self) -> Any:
        """Give the loader, where a checkpoint left it."""
        loader = self._loader("train")
        if self._state is not None:
            # Not left to the trainer: it forgets the state if the number of steps is asked for before it is restored.
            state, self._state = self._state, None
            loader.load_state_dict(state)
        return loader

    def val_dataloader(self) -> Any:
        """Give the loader for validation; an empty list where there is none."""
        return [] if self._makers["val"] is None else self._loader("val")

    def state_dict(self) -> dict[str, Any]:
        """Say how far training is, for a checkpoint."""
        loader = self._loaders.get("train")
        if self._state is not None or loader is None:  # not used yet
            return {} if self._state is None else {"train": self._state}
        return {"train": loader.state_dict()}

    def _state_of(self, loader: Any) -> dict[str, Any]:
        """Say how far the loader of training is; what the trainer does not want of an epoch counts as done."""
        state: dict[str, Any] = type(loader).state_dict(loader)
        return _of_next_epoch(state) if self._is_epoch_over() else state

    def _is_epoch_over(self) -> bool:
        """Whether the trainer has had all batches that it wants of an epoch, which may be fewer than there are."""
        if self.trainer is None:
            return False
        ready = self.trainer.fit_loop.epoch_loop.batch_progress.current.ready
        return bool(ready >= self.trainer.num_training_batches)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from there, when training begins."""
        self._state = state_dict.get("train")

    def teardown(self, stage: str) -> None:
        """End the workers of queues."""
        for loader in self._loaders.values():
            if isinstance(getattr(loader, "dataset", None), Queue):
                loader.dataset.close()


def _of_next_epoch(state: dict[str, Any]) -> dict[str, Any]:
    """Give the state of a loader of which the rest of an epoch is not wanted."""
    place = "position" if "position" in state else "draw"
    return {"seed": state["seed"], "epoch": state["epoch"] + 1, place: 0} if state.get(place) else state


class ResumeLoaders(_base("Callback")):  # type: ignore[misc]
    """Has plain loaders that are given to `Trainer.fit` go on where a checkpoint left them, in any case.

    Lightning does so itself, but not if anything has read `trainer.estimated_stepping_batches` before, as schedulers of learning
    rates do in `configure_optimizers`: then training begins an epoch anew, without a word. `PatchDataModule` does not need this.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from voxloom.integrations.lightning import ResumeLoaders
        >>> trainer = Trainer(callbacks=[ResumeLoaders()], logger=False, enable_checkpointing=False, accelerator="cpu")
    """

    def __init__(self) -> None:
        super().__init__()
        self._states: list[Mapping[str, Any]] = []

    def __repr__(self) -> str:
        return "ResumeLoaders()"

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Mapping[str, Any]) -> None:
        """Remember the states of the checkpoint."""
        loops = checkpoint.get("loops", {}).get("fit_loop", {})
        self._states = list(loops.get("state_dict", {}).get("combined_loader", []))

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Load them where the trainer did not."""
        states, self._states = self._states, []
        if not states:
            return
        loaders = [each for each in trainer.fit_loop._combined_loader.flattened if hasattr(each, "load_state_dict")]
        if len(loaders) != len(states):
            raise QueueError(
                f"the checkpoint has states of {len(states)} loaders, but there are {len(loaders)} that can be resumed: give the"
                " trainer the same loaders as before"
            )
        for loader, state in zip(loaders, states, strict=True):
            if loader.state_dict() != state:
                loader.load_state_dict(state)


def dice(predicted: Tensor, truth: Tensor) -> dict[str, float]:
    """Give the Dice coefficient of each label but 0 that the truth has, and their mean.

    Args:
        predicted: labels, of any shape.
        truth: the same.

    Example:
        >>> import torch
        >>> dice(torch.tensor([0, 1, 1, 2]), torch.tensor([0, 1, 2, 2]))
        {'dice_1': 0.666..., 'dice_2': 0.666..., 'dice': 0.666...}
    """
    found = {}
    for label in torch.unique(truth).tolist():
        if label:
            one, other = predicted == label, truth == label
            found[f"dice_{int(label)}"] = 2 * int((one & other).sum()) / int(one.sum() + other.sum())
    return found | ({"dice": sum(found.values()) / len(found)} if found else {})


class VolumeValidation(_base("Callback")):  # type: ignore[misc]
    """Validates on whole volumes after an epoch of training, and logs the mean of each metric.

    The network that is trained is applied patch by patch, so that volumes of any size take bounded memory. Of several processes
    each takes a share of the subjects.

    Args:
        subjects: the subjects.
        patch_size: see `Predictor`.
        patch_overlap: see there.
        image: name of the image that the network is given; several become channels.
        labels: name of the label map that is the truth.
        metric: function of predicted and true labels, tensors `(1, I, J, K)`, that gives numbers by name.
        every_n_epochs: after which epochs.
        network: name of the attribute of the module that is the network; None for the module itself.
        prefix: goes before the names in the log.
        **options: more arguments of `Predictor`; `reduce` is `"argmax"` if it is not given.

    Example:
        >>> import voxloom as vx
        >>> from voxloom.integrations.lightning import VolumeValidation
        >>> subjects = [vx.datasets.HeadPhantom(32, seed=0)]
        >>> validation = VolumeValidation(subjects, patch_size=16, patch_overlap=0.5, image="t1", labels="labels")
    """

    def __init__(
        self,
        subjects: Sequence[Any],
        patch_size: Any,
        patch_overlap: Any = 0.5,
        *,
        image: str | Sequence[str],
        labels: str,
        metric: Callable[[Tensor, Tensor], Mapping[str, float]] = dice,
        every_n_epochs: int = 1,
        network: str | None = None,
        prefix: str = "val_",
        **options: Any,
    ) -> None:
        super().__init__()
        self.subjects: list[Subject] = [as_subject(each, f"subject {number}") for number, each in enumerate(subjects)]
        if not self.subjects:
            raise SubjectError("there is no subject to validate on")
        self.patch_size, self.patch_overlap, self.image, self.labels = patch_size, patch_overlap, image, labels
        self.metric, self.every_n_epochs, self.network, self.prefix = metric, every_n_epochs, network, prefix
        self.options = {"reduce": "argmax", **options}

    def __repr__(self) -> str:
        return (
            f"VolumeValidation({len(self.subjects)} subjects, patch_size={self.patch_size}, patch_overlap={self.patch_overlap})"
        )

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Validate."""
        if trainer.sanity_checking or (trainer.current_epoch + 1) % self.every_n_epochs:
            return
        for name, value in self.validated(trainer, pl_module).items():
            pl_module.log(f"{self.prefix}{name}", value, prog_bar=name == "dice", rank_zero_only=False)

    def validated(self, trainer: Any, pl_module: Any) -> dict[str, float]:
        """Give the mean of each metric over all subjects that have it, on all ranks."""
        model = pl_module if self.network is None else getattr(pl_module, self.network)
        predictor = Predictor(model, self.patch_size, self.patch_overlap, **self.options)
        sums: dict[str, tuple[float, int]] = {}
        for subject in self.subjects[trainer.global_rank :: trainer.world_size]:
            predicted = predictor(subject, image_name=self.image)
            for name, value in self.metric(predicted.data, subject.get_image(self.labels).data).items():
                total, count = sums.get(name, (0.0, 0))
                sums[name] = total + float(value), count + 1
            subject.unload()
        return {name: total / count for name, (total, count) in sorted(_of_all_ranks(sums, trainer.world_size).items())}


def _of_all_ranks(sums: dict[str, tuple[float, int]], world_size: int) -> dict[str, tuple[float, int]]:
    if world_size == 1:
        return sums
    gathered: list[Any] = [None] * world_size
    torch.distributed.all_gather_object(gathered, sums)
    names = {name for each in gathered for name in each}
    return {name: tuple(map(sum, zip(*(each[name] for each in gathered if name in each), strict=True))) for name in names}  # type: ignore[misc]

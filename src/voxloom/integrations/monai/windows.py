"""A network as MONAI calls it: with conditions, places and weights of its windows, and outputs of any form."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from ...errors import OutputError
from ...models.outputs import weighted

__all__ = ["WindowsNetwork"]


class WindowsNetwork:
    """Calls a network as MONAI does, and gives its outputs the weights that MONAI gives them.

    The weights follow each output as one more channel. Sums of both, in which all windows count alike, are divided by one another
    when a voxel is complete: so the weights may be of any form, and may differ from window to window.
    """

    def __init__(
        self,
        predictor: Callable[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        inputs: Tensor,
        condition: Tensor | None,
        with_coord: bool,
        weights: Tensor | None,
        process_fn: Callable[..., Any] | None,
    ) -> None:
        self._predictor, self._args, self._kwargs = predictor, args, dict(kwargs)
        self._channels, self._dtype = inputs.shape[1], inputs.dtype
        self._condition, self._has_coordinates = condition, with_coord
        self._weights, self._process = weights, process_fn
        self._number = 0
        self._names: list[Any] | None = None
        self._is_single = False
        self.scales: dict[Any, tuple[float, ...]] = {}
        """How many times larger than a window each output is, where one is not as large as that."""

    def begin(self, number: int) -> None:
        """Take the windows of another volume of the batch."""
        self._number = number

    def __call__(self, batch: Tensor) -> Any:
        """Call the network with a batch of windows, which conditions and coordinates follow as more channels.

        Raises:
            OutputError: if it returns something else than tensors `(B, C, ...)`.
        """
        windows, args, kwargs = batch[:, : self._channels], list(self._args), self._kwargs
        if self._condition is not None:
            own = batch[:, self._channels :][:, : self._condition.shape[1]]
            kwargs = kwargs | {"condition": own.to(self._condition.dtype)}
        if self._has_coordinates:
            args.insert(0, self._coordinates(batch))
        windows = windows.to(self._dtype)
        names, outputs = self._flat(self._predictor(windows, *args, **kwargs))
        weights = None if self._weights is None else self._weights.to(windows.device)
        if self._process is not None:
            names, outputs, weights = self._processed(names, outputs, windows, weights)
        self._look(names, outputs, windows.shape[2:])
        made = {name: self._weighted(output, weights) for name, output in zip(names, outputs, strict=True)}
        return next(iter(made.values())) if self._is_single else made

    def _flat(self, output: Any) -> tuple[list[Any], list[Tensor]]:
        self._is_single = isinstance(output, Tensor)
        if isinstance(output, Tensor):
            self._names = None
            return [None], [output]
        if isinstance(output, Mapping):
            try:
                self._names = sorted(output)  # as MONAI has them
            except TypeError as error:
                raise OutputError(f"the network returned a dict with the keys {list(output)}, which have no order") from error
            return [str(name) for name in self._names], [output[name] for name in self._names]
        if isinstance(output, list | tuple) and len(output) == 1:
            return self._flat(output[0])
        if isinstance(output, list | tuple):
            self._names = None
            return [str(number) for number in range(len(output))], list(output)
        raise OutputError(f"the network returned something of type {type(output).__name__}: it must be tensors")

    def _processed(
        self, names: list[Any], outputs: list[Tensor], windows: Tensor, weights: Any
    ) -> tuple[list[Any], list[Tensor], Any]:
        """Let a function change the outputs of a batch of windows, of which there may be another number then, and the weights."""
        given = weights.to(windows.dtype) if windows.is_floating_point() else weights
        assert self._process is not None
        processed, weights = self._process(tuple(outputs), windows, given)
        changed = list(processed) if isinstance(processed, list | tuple) else [processed]
        if self._names is None:
            self._is_single = len(changed) == 1
            return [None] if self._is_single else [str(number) for number in range(len(changed))], changed, weights
        if len(changed) != len(names):
            raise OutputError(
                f"process_fn returned {len(changed)} outputs for {len(names)}, {', '.join(names)}: it must return as many, in"
                " this order"
            )
        return names, changed, weights

    def _look(self, names: list[Any], outputs: Sequence[Tensor], spatial: Sequence[int]) -> None:
        for output in outputs:
            if not isinstance(output, Tensor) or output.ndim != 2 + len(spatial):
                what = f"of shape {tuple(output.shape)}" if isinstance(output, Tensor) else f"of type {type(output).__name__}"
                axes = "(B, C, I, J, K)" if len(spatial) == 3 else "(B, C, I, J)"
                raise OutputError(f"the network returned something {what}: it must be tensors {axes}")
        found = {
            name: tuple(made / given for made, given in zip(output.shape[2:], spatial, strict=True))
            for name, output in zip(names, outputs, strict=True)
        }
        if any(scale != 1 for each in found.values() for scale in each):
            self.scales = {name: each if len(each) == 3 else (*each, 1.0) for name, each in found.items()}

    def _weighted(self, output: Tensor, weights: Tensor | None) -> Tensor:
        if weights is None:
            return output
        while weights.ndim < output.ndim:
            weights = weights[None]
        return weighted(output, weights)

    def _coordinates(self, batch: Tensor) -> list[list[slice]]:
        """Say where each window lies in its batch and volume."""
        first = batch[:, -3:].flatten(2)[:, :, 0].round().long().tolist()
        sizes = [*batch.shape[2:], 1][:3]
        ndim = batch.ndim - 2
        volume = [slice(self._number, self._number + 1), slice(None)]
        return [
            volume + [slice(start, start + size) for start, size in zip(starts[:ndim], sizes[:ndim], strict=True)]
            for starts in first
        ]

    def restored(self, results: dict[Any, Tensor]) -> Any:
        """Give results in the form in which the network gave its outputs."""
        if self._is_single:
            return next(iter(results.values()))
        if self._names is None:
            return tuple(results.values())
        return dict(zip(self._names, results.values(), strict=True))

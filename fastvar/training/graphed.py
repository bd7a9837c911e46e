"""A micro-batch of training by CUDA graphs: forward, loss and backward are captured once for each kind, then replayed.

A kind is the shapes and dtypes of the inputs, the options, the mode of each module and its adapters, which weights are
trained, autocast and PyTorch's settings of precision and attention. The first call of a kind runs as it is; the second
one runs on memory of the graphs' own and is captured after that; all others copy their inputs there and replay. A
replay adds its gradients to the `.grad` that parameters had at the capture, so these have to stay:
`zero_grad(set_to_none=False)`. It draws the random numbers that the call would have drawn.

Optimizer, clipping and averages are no part of it. Weights are read where they are, so that they may change between
calls. Where weights or gradients lie elsewhere than at the capture, all is captured again, CAPTURES times at most.
"""

from __future__ import annotations

import gc
import logging
import sys
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only

from fastvar.models import graphs

CAPTURES = 4  # of a kind: gradients that are made anew in each step would be captured in each step
MOVED = (
    f"captured {CAPTURES} times already: weights or gradients moved (zero_grad(set_to_none=False) keeps gradients), or "
    f"there are more than {graphs.KEPT} kinds"
)
Tensors = dict[str, torch.Tensor]
Inputs = dict[str, Any]  # tensors, None, and tuples of tensors and numbers such as `fastvar.models.TextFeatures`

logger = logging.getLogger("fastvar")


class GraphedStep:
    """A function with a backward pass, by graphs where that can be; elsewhere it is called, and a warning says why.

    The graphs keep what a micro-batch keeps between its passes, its activations above all, as long as this object
    lives; those of several kinds share it. All calls are to be made from one stream.

    Args:
        function: called as the step is. It computes a loss, runs its backward pass and answers tensors by name. What
            else it reads, besides arguments and modules, has to stay as it was; see `clear`. Numbers of the host become
            part of a graph, those among the inputs too: each tuple of an Infinity's lengths of texts has a graph of its
            own; texts are encoded and flips with their seed are drawn before.
        modules: those that it reads or trains, the tokenizer of a model included. The first one decides the device.
    """

    def __init__(self, function: Callable[..., Tensors], *modules: nn.Module) -> None:
        self.function, self.modules = function, modules
        self._graphs: OrderedDict[Hashable, _Graph] = OrderedDict()  # the one used last at the end
        self._captures: dict[Hashable, int] = {}  # of each kind that was seen
        self._barred: dict[Hashable, str] = {}  # those that are not captured, and why
        self._weights: tuple[int, ...] = ()
        self._pool: graphs.Pool = None
        self._said: set[str] = set()

    def __call__(self, *options: Hashable, **tensors: Any) -> Tensors:
        """What the function answers, detached; gradients are added to the parameters'. The inputs by name are tensors,
        None, or tuples of tensors and numbers. No tensor may need a gradient, nor share memory with one that the
        function writes to."""
        device = next(self.modules[0].parameters()).device
        surveyed = graphs.obstacle(device) or graphs.looked_at(self.modules, training=True)
        if isinstance(surveyed, str):
            return self._plainly(options, tensors, f"expected {surveyed}")
        inputs = tree_map_only(torch.Tensor, lambda t: (t.shape, t.dtype, t.device), tensors)
        key = (options, tuple(inputs.items()), surveyed.modes, graphs.settings(device.type))
        with graphs.alone(device):
            graph = self._graphs.get(key)
            if surveyed.weights != self._weights or (graph is not None and not graph.fits()):
                self.clear()
                self._weights, graph = surveyed.weights, None
            if graph is not None:
                self._graphs.move_to_end(key)
                return graph(tensors)
            if len(self._captures) > graphs.SEEN:
                self._captures.clear()
            captures = self._captures.get(key)
            self._captures[key] = 0 if captures is None else captures + 1
            if captures == CAPTURES and key not in self._barred:
                self._barred[key] = MOVED
            if captures is None or key in self._barred:
                return self._plainly(options, tensors, self._barred.get(key, ""))
            return self._captured(key, options, tensors, device)

    def clear(self) -> None:
        """Free the graphs. To be called after a change of what the function reads that no argument tells of and that is
        neither of weights, gradients, modes nor adapters, such as a rate of dropout."""
        self._forget(0)

    def _forget(self, kept: int) -> None:
        """All but those that were used last; the pool's memory goes with the last of them."""
        if len(self._graphs) > kept and torch.cuda.is_available():
            torch.cuda.synchronize()  # they may be running
        while len(self._graphs) > kept:
            self._graphs.popitem(last=False)
        if not self._graphs:
            self._pool = None

    def _plainly(self, options: tuple[Hashable, ...], tensors: Inputs, why: str = "") -> Tensors:
        self._say(why)
        return {name: value.detach() for name, value in self.function(*options, **tensors).items()}

    def _say(self, why: str) -> None:
        if why and why not in self._said:
            self._said.add(why)
            logger.warning("GraphedStep: runs without CUDA graphs: %s", why)

    def _captured(
        self,
        key: Hashable,
        options: tuple[Hashable, ...],
        tensors: Inputs,
        device: torch.device,
    ) -> Tensors:
        """By the run that precedes the capture, which also makes the gradients that are not there yet."""
        given = tree_map_only(torch.Tensor, torch.clone, tensors)
        answers: list[Tensors] = []
        outer, failed = sys.exception(), ""

        def run() -> Tensors:
            answers.append(self._plainly(options, given))
            return answers[-1]

        self._forget(graphs.KEPT - 1)
        if device.type == "cuda":
            gc.collect()  # what is left of former backward passes would tie the capture to the stream they ran on
        try:
            after, replay, self._pool, _ = graphs.capture(run, device, self._pool)
        except Exception as error:
            if not answers:  # the call itself failed
                raise
            failed = f"a capture failed: {graphs.reason(error, outer)}"
        if failed:  # the exception, and what it holds of the device's memory, is gone
            self.clear()
            if device.type == "cuda":
                torch.cuda.empty_cache()
            self._barred[key] = failed
            self._say(failed)
            return answers[0]
        trained = [p for module in self.modules for p in module.parameters() if p.grad is not None]
        kept = [(p, p.grad, p.grad.data_ptr()) for p in trained if p.grad is not None]
        self._graphs[key] = _Graph(given, after, replay, kept)
        return answers[0]


class _Graph(NamedTuple):
    """What a capture reads, answers and is replayed by, and the gradients that it adds to, which it keeps alive."""

    given: Inputs
    after: Tensors
    replay: Callable[[], None]
    gradients: list[tuple[nn.Parameter, torch.Tensor, int]]

    def fits(self) -> bool:
        return all(p.grad is grad and grad.data_ptr() == place for p, grad, place in self.gradients)

    def __call__(self, tensors: Inputs) -> Tensors:
        with torch.no_grad():
            for own, given in zip(tree_leaves(self.given), tree_leaves(tensors), strict=True):
                if isinstance(own, torch.Tensor):
                    own.copy_(given, non_blocking=True)
            self.replay()
            return {name: value.clone() for name, value in self.after.items()}


def check_alone(setting: str, wanted: bool, accelerator: Any) -> None:
    """Raise a ValueError that names a setting if graphs are wanted in one of several processes or with FSDP: what these
    do between a backward pass and the next is not captured."""
    kind = str(getattr(accelerator.distributed_type, "value", accelerator.distributed_type))
    if wanted and kind != "NO":
        raise ValueError(f"{setting}: expected False in a run of several processes or with FSDP ({kind}), got True")

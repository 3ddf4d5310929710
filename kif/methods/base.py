"""What a continual-learning method is to the training loop."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from kif.arena import ParameterArena
from kif.captured import CapturedSteps
from kif.config import SECTIONS, RunConfig
from kif.distributed import world
from kif.families import Encoded, Family, LanguageModel
from kif.layers import use_liger
from kif.low_precision import BF16Adapter
from kif.optimizer import ArenaAdamW, OptimizerConfig, Scoring
from kif.tasks import Task
from kif.timing import Stopwatch

METHOD_FILE = "kif_method.safetensors"
"""In an adapter folder, what a method learned besides LoRA."""


class Method(ABC):
    """One way to learn tasks one after another. The loop owns data and order; a method owns parameters and updates.

    The loop runs rounds: `inner_steps` times loss on new rows, backward and `inner_step`; `outer_steps` times
    loss on memory rows, backward and `outer_step`; `end_round`. A method without an outer loop has
    `outer_steps` 0. All other hooks have the behaviour of plain sequential LoRA.

    With several processes each has a method object and sees its part of a step's rows. `arena.grad` has been summed
    over them when a step is called; anything else gathered from rows needs `kif.distributed.all_reduce_`, so that all
    stay equal.

    Args:
        lm: the model with its adapter.
        config: the whole run's configuration.

    Class attributes:
        name: as on the command line.
        summary: one line for `kif methods`.
        source: where the method is from.
        section: the part of RunConfig with its own hyperparameters (`kif.config.SECTIONS`), if it has any.
        unused: fields of RunConfig, other than the sections of other methods, that have no effect on it.
        refused: the model families it cannot work with, and why.
        refused_options: fields of RunConfig that it works with at their default only, and why.
        plain_adapter: whether PEFT alone answers from a saved adapter as the method does.
        plain_passes: whether a pass of training is that of the model alone and the same in all steps, so that it can be
            recorded (`cuda_graphs`).

    Raises: ValueError for a model of a refused family and a refused option.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    source: ClassVar[str]
    section: ClassVar[str | None] = None
    unused: ClassVar[tuple[str, ...]] = ()
    refused: ClassVar[Mapping[Family, str]] = {}
    refused_options: ClassVar[Mapping[str, str]] = {}
    plain_adapter: ClassVar[bool] = True
    plain_passes: ClassVar[bool] = False

    @classmethod
    def adapter_config(cls, config: RunConfig, tasks: int) -> RunConfig:
        """The configuration by which the adapter for a sequence of so many tasks is made.

        Raises: ValueError for a refused option.
        """
        cls.check_options(config)
        return config

    @classmethod  # noqa: B027
    def attach(cls, lm: LanguageModel, config: RunConfig, folder: Path) -> None:
        """Give a model that was loaded from a saved adapter what `save_adapter` wrote besides LoRA."""

    @classmethod
    def check_family(cls, lm: LanguageModel) -> None:
        """Raise ValueError for a model of a refused family; done before anything is changed on the model."""
        if lm.family in cls.refused:
            raise ValueError(f"{cls.name} does not work with {lm.family} models: {cls.refused[lm.family]}")

    @classmethod
    def check_options(cls, config: RunConfig) -> None:
        """Raise ValueError for a refused option that is not at its default."""
        if config.cuda_graphs and not cls.plain_passes:
            raise ValueError(f"cuda_graphs does not work with {cls.name}, which changes passes: leave it out")
        default = RunConfig()
        for name, reason in cls.refused_options.items():
            if getattr(config, name) != getattr(default, name):
                raise ValueError(f"{name} does not work with {cls.name}, {reason}: leave it out")

    @classmethod
    def of_micro_batches(cls, config: RunConfig) -> str | None:
        """What each micro-batch of a step (`gradient_accumulation`, several processes) has of its own, so that the
        step's result depends on how its rows are split; None: nothing.
        """
        return None

    def __init__(self, lm: LanguageModel, config: RunConfig) -> None:
        self.check_family(lm)
        self.check_options(config)
        self.lm, self.config = lm, config
        self.arena = ParameterArena.of(lm.model)
        self.stopwatch = Stopwatch()
        if config.adapter_precision == "bf16" and "adapter_precision" not in self.unused:
            BF16Adapter(lm, self.arena)
        if config.use_liger_kernel:
            use_liger(lm.base)
        self.captured = CapturedSteps(lm, self.arena, _batch_sizes(config)) if config.cuda_graphs else None

    @property
    @abstractmethod
    def skipped(self) -> int:
        """Steps that changed nothing because their gradient was not finite. Waits for the device."""

    @property
    def kept(self) -> dict[str, float] | None:
        """Fractions of the elements that masks held, for methods that have masks. Waits for the device."""
        return None

    def unreached(self) -> list[str]:
        """Names of trained parameters that no gradient has reached in the present task. Waits for the device."""
        return []

    @property
    def label(self) -> str:
        """Name, with every hyperparameter of its own that is not the default, for tables."""
        if self.section is None:
            return self.name
        default = asdict(SECTIONS[self.section]())
        values = asdict(getattr(self.config, self.section))
        changes = [f"{name}={value}" for name, value in values.items() if value != default[name]]
        return f"{self.name} ({', '.join(changes)})" if changes else self.name

    @property
    def inner_steps(self) -> int:
        """Steps on new rows in a round; for methods without rounds, how often progress is logged."""
        return 10

    @property
    def outer_steps(self) -> int:
        """Steps on memory rows in a round of the present task."""
        return 0

    def phases(self, tasks: Sequence[Task]) -> list[list[Task]]:
        """Which tasks are trained together, in order; evaluation follows each phase."""
        return [[task] for task in tasks]

    def begin_task(self, index: int, memory: Sequence[Encoded]) -> None:  # noqa: B027
        """Before the phase `index` (from 0); `memory` holds rows of all tasks before it."""

    def training_rows(self, rows: Sequence[Encoded], memory: Sequence[Encoded]) -> list[Encoded]:
        """The rows that inner steps draw from, given the phase's own rows and the memory."""
        return list(rows)

    def loss(self, rows: Sequence[Encoded]) -> tuple[Tensor, int]:
        """(sum of the loss, number it is a sum over) of a micro-batch of new or memory rows.

        The loop divides by the number of the whole step, so a penalty on the parameters is added times the number.
        """
        return self.lm.loss(self.lm.collate(rows))

    def backward(self, rows: Sequence[Encoded], count: int) -> Tensor:
        """Add the gradient of the summed loss of a micro-batch, divided by `count`; returns that loss, 0-d."""
        if self.captured is not None:
            return self.captured.backward(rows, count)
        loss = self.loss(rows)[0] / count
        loss.backward()
        return loss.detach()

    @abstractmethod
    def inner_step(self, lr: float) -> None:
        """Update after backward on new rows; must zero the gradients."""

    def outer_step(self, lr: float) -> None:
        """Update after backward on memory rows; must zero the gradients."""
        raise NotImplementedError(f"{self.name} has no outer loop")

    def end_round(self) -> None:  # noqa: B027
        """After the last step of a round."""

    def end_task(self, index: int) -> None:  # noqa: B027
        """After the last round of phase `index`, before evaluation."""

    def save_adapter(self, folder: Path) -> None:
        """Write what was learned so far as a PEFT folder (adapter_model.safetensors, adapter_config.json).

        What PEFT has no place for goes into `METHOD_FILE` beside it, where `attach` finds it.
        """
        self.lm.model.save_pretrained(str(folder), safe_serialization=True)

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Everything the method's next step depends on, at the end of a round: nested dicts with string keys and lists
        of tensors, numbers, strings and None. What `begin_task` and `training_rows` set in any case may be left out.
        """

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`. Within a task it is called before `begin_task` and `training_rows`, and once more
        after them, to overwrite what they changed.
        """


class SingleAdapterMethod(Method):
    """One adapter continued over all tasks with AdamW; the optimizer starts anew with each task."""

    def __init__(self, lm: LanguageModel, config: RunConfig) -> None:
        super().__init__(lm, config)
        self.optimizer = ArenaAdamW(self.arena, "adamw", optimizer_config(config))

    def begin_task(self, index: int, memory: Sequence[Encoded]) -> None:
        self.optimizer.reset()

    @property
    def skipped(self) -> int:
        return int(self.optimizer.skipped.item())

    def unreached(self) -> list[str]:
        return self.optimizer.unreached()

    def inner_step(self, lr: float) -> None:
        self.arena.check()
        with self.stopwatch.section("optimizer", self.arena.device):
            self.modify_gradient()
            self.optimizer.step(lr, self.scoring())

    def modify_gradient(self) -> None:
        """Change `arena.grad`, the gradient of the step's mean loss, before the update."""

    def scoring(self) -> Scoring | None:
        """An importance to update in the optimizer's pass."""
        return None

    def state_dict(self) -> dict[str, Any]:
        return {"arena": self.arena.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.arena.load_state_dict(state["arena"])
        self.optimizer.load_state_dict(state["optimizer"])


def _batch_sizes(config: RunConfig) -> list[int]:
    """Rows of a process's full micro-batches."""
    parts = world()[1] * config.gradient_accumulation
    return [-(-size // parts) for size in (config.batch_size, config.outer_batch_size or config.batch_size)]


def optimizer_config(config: RunConfig) -> OptimizerConfig:
    """The AdamW part of a run's configuration."""
    return OptimizerConfig(
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
    )


def save_method_file(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write `METHOD_FILE`."""
    from safetensors.torch import save_file

    # views of one arena share their memory, which safetensors refuses
    own = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    save_file(own, folder / METHOD_FILE)


def load_method_file(folder: Path) -> dict[str, Tensor]:
    """What `save_method_file` wrote. Raises: FileNotFoundError, or ValueError naming the file if it is damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / METHOD_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: the adapter was not saved by this method")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from error

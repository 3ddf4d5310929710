"""Recurrent-KIF in transformers' Trainer: `KIFTrainer`, or `KIFMixin` for a Trainer of one's own.

The Trainer's loop makes the inner steps: its optimizer is `KIFOptimizer`, whose `step` is the engine's. After the Q-th
one a callback makes the outer steps, by the Trainer's own `training_step` on batches of the memory, and fuses.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from copy import copy
from dataclasses import asdict, dataclass, field, fields
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, Subset
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainerCallback, TrainingArguments
from transformers.utils import is_peft_available

from kif.arena import ParameterArena
from kif.attention import without_cudnn
from kif.config import KIFConfig
from kif.engine import RecurrentKIF
from kif.memory import ReplayMemory
from kif.optimizer import OptimizerConfig

OPTIMIZERS = ("adamw_torch", "adamw_torch_fused")
"""Values of `optim` that name what the engine does: AdamW in fp32."""
_SCHEDULE = "choose its schedule by lr_scheduler_type and lr_scheduler_kwargs, or override create_scheduler"


@dataclass
class KIFArguments:
    """The fields that Recurrent-KIF adds to a class of training arguments: `class Mine(KIFArguments, SFTConfig)`.

    Of the arguments that are there, `learning_rate`, its schedule and warm-up hold for inner steps and, at the value of
    the round's last inner step, for outer ones; `max_steps`, `save_steps`, `logging_steps` and the like count inner
    steps; batch size and gradient accumulation hold for both kinds of steps; `weight_decay` holds for all
    trainable parameters, biases and norms too.

    Args:
        kif: switches of the method: a KIFConfig; a dict of its fields, in which `preset` may name the set that the
            others change; or a string: such a dict as JSON, or a preset's name. It is kept as a dict of all fields, one
            entry in `to_dict`, checkpoints and trackers, as transformers does it for `lr_scheduler_kwargs`.
        outer_learning_rate: peak learning rate of outer steps. Default: `learning_rate`.

    Raises: ValueError for an unknown switch or value, for `optim` other than AdamW, fp16, DeepSpeed, FSDP and the
        other kinds of sharding.
    """

    # the parser of transformers takes the second type for the command line
    kif: KIFConfig | str | dict[str, Any] | None = field(
        default=None,
        metadata={"help": "Switches of Recurrent-KIF: a preset's name, or fields of KIFConfig as JSON."},
    )
    outer_learning_rate: float | None = field(
        default=None, metadata={"help": "Peak learning rate of outer steps. Default: learning_rate."}
    )

    def __post_init__(self) -> None:
        self.kif = asdict(kif_config(self.kif))
        given: Any = self
        if self.outer_learning_rate is not None and not min(self.outer_learning_rate, given.learning_rate) > 0:
            rates = f"{self.outer_learning_rate} and {given.learning_rate}"
            raise ValueError(f"outer_learning_rate and learning_rate must be positive, got {rates}")
        if given.deepspeed or os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") == "true":
            raise ValueError(_sharded("DeepSpeed"))
        if given.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "false") == "true":
            raise ValueError(_sharded("FSDP"))
        if getattr(given, "parallelism_config", None) is not None:
            raise ValueError(_sharded("parallelism_config"))
        _check_optimization(given)
        super().__post_init__()  # type: ignore[misc]


@dataclass
class KIFTrainingArguments(KIFArguments, TrainingArguments):
    """TrainingArguments with the switches of Recurrent-KIF."""


@dataclass
class KIFSeq2SeqTrainingArguments(KIFArguments, Seq2SeqTrainingArguments):
    """Seq2SeqTrainingArguments with the switches of Recurrent-KIF."""


def kif_config(value: KIFConfig | str | dict[str, Any] | None) -> KIFConfig:
    """The switches as `KIFArguments.kif` takes them. Raises: ValueError naming what is wrong."""
    if isinstance(value, str) and not value.lstrip().startswith("{"):
        value = {"preset": value}
    elif isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"kif is neither a preset's name nor JSON ({error}): {value}") from error
    given = asdict(value) if isinstance(value, KIFConfig) else {} if value is None else value
    if not isinstance(given, Mapping):
        raise ValueError(f"kif must be a KIFConfig, a dict of its fields or a string, got {value!r}")
    given = dict(given)
    preset = given.pop("preset", "paper")
    known = {entry.name for entry in fields(KIFConfig)}
    for name in given:
        if name not in known:
            raise ValueError(f"kif has no switch {name!r}; there are preset, {', '.join(sorted(known))}")
    return KIFConfig.preset(preset, **given)


@contextmanager
def _memory_at_fault() -> Iterator[None]:
    """Errors name memory_dataset: the Trainer's own speak of "the dataset", and at the end of a round."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError):
        # no fault of the rows; auto_find_batch_size waits for it
        raise
    except Exception as error:
        raise ValueError(
            "memory_dataset gives no batches; its rows must be prepared as those of the Trainer's train_dataset are, "
            f"as those of draw_memory are ({type(error).__name__}: {error})"
        ) from error


class MemoryStream(Iterator[Any]):
    """Endless batches of the replay memory, epoch after epoch.

    Args:
        loader: a data loader; with `set_epoch`, if the order depends on the epoch.
        seed: an order that is drawn from torch's random numbers depends on this and on the epoch alone.
    """

    def __init__(self, loader: Iterable[Any], seed: int = 0) -> None:
        self.loader, self.seed = loader, seed
        self.epoch = self.position = 0
        self._batches: Iterator[Any] | None = None

    def __next__(self) -> Any:
        """The next batch. Raises: ValueError when an epoch has none, or when its rows cannot be collated."""
        batch = self._fetch()
        if batch is None:
            self.load_state_dict({"epoch": self.epoch + 1, "position": 0})
            batch = self._fetch()
        if batch is None:
            raise ValueError("memory_dataset gives no batch: it is empty, or drop_last drops its only one")
        self.position += 1
        return batch

    def _fetch(self) -> Any:
        batches = self.open()
        with _memory_at_fault():
            batch = next(batches, None)
            if isinstance(batch, Mapping) and not batch:
                raise ValueError("its rows have no column that the model takes")
            return batch

    @_memory_at_fault()
    def open(self) -> Iterator[Any]:
        """Start the epoch's iterator where the stream stands; batches that are skipped may draw random numbers."""
        if self._batches is None:
            if hasattr(self.loader, "set_epoch"):
                self.loader.set_epoch(self.epoch)
            # a sampler draws the order (group_by_length) with the first batch, of which new rows must not depend
            with torch.random.fork_rng(devices=()):
                torch.default_generator.manual_seed(self.seed + self.epoch)
                batches = iter(self.loader)
                first = list(islice(batches, 1))
            self._batches = chain(first, batches)
            for _ in range(self.position):
                next(self._batches, None)
        return self._batches

    def state_dict(self) -> dict[str, int]:
        """Where the stream stands."""
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.position = state["epoch"], state["position"]
        self._batches = None


class KIFOptimizer(torch.optim.Optimizer):
    """What the Trainer, its schedule and its checkpoints see of the engine: one group with a learning rate.

    `step` is an inner step, or without memory a plain one; gradients are clipped in it. `state_dict` holds
    the engine (weights, moments, importances, snapshots, counts: a round may be in progress) and the memory's position,
    as tensors and numbers only.

    Args:
        model: its trainable parameters go into an arena.
        config: switches of the method.
        optimizer: hyperparameters of AdamW.
        lr: peak learning rate.
        memory: batches of the replay memory, if there is one.

    Attributes:
        engine: the engine, on an arena of its own.
        inner_done: inner steps of the present round.
        last_lr: learning rate of the last inner step.
    """

    def __init__(
        self, model: nn.Module, config: KIFConfig, optimizer: OptimizerConfig, lr: float, memory: MemoryStream | None
    ) -> None:
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.engine = RecurrentKIF(ParameterArena.of(model), config, optimizer)
        self.engine.arena.zero_grad()
        self.memory = memory
        self.inner_done, self.last_lr = 0, lr
        super().__init__(self._parameters, {"lr": lr})

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """An inner step at the group's learning rate. Raises: ValueError for a closure, which it does not call."""
        if closure is not None:
            raise ValueError("KIFOptimizer takes no closure")
        self.last_lr = float(self.param_groups[0]["lr"])
        if self.memory is None:
            self.engine.plain_step(self.last_lr)
        else:
            self.engine.inner_step(self.last_lr)
            self.inner_done += 1

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Gradients become zeros in the arena, also with `set_to_none`."""
        self.engine.arena.zero_grad()
        self.attach_gradients()

    def attach_gradients(self) -> None:
        """Have backward add into the arena again after `model.zero_grad`, which sets gradients to None."""
        arena = self.engine.arena
        for parameter, (_, view) in zip(self._parameters, arena.views(arena.grad), strict=True):
            if parameter.grad is None:
                parameter.grad = view

    def state_dict(self) -> dict[str, Any]:
        kif = {"engine": self.engine.state_dict(), "inner_done": self.inner_done, "last_lr": self.last_lr}
        if self.memory is not None:
            kif["memory"] = self.memory.state_dict()
        return {**super().state_dict(), "kif": kif}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue.

        Raises: ValueError for a state of another optimizer or other switches, or with memory where there is none;
            ArenaError for one of other parameters.
        """
        if "kif" not in state_dict:
            raise ValueError(
                "the checkpoint's optimizer is not Recurrent-KIF's: train() without it, or with its Trainer"
            )
        kif = state_dict["kif"]
        if ("memory" in kif) != (self.memory is not None):
            raise ValueError(
                "the checkpoint was made with memory_dataset and now there is none, or the other way round"
            )
        # the engine first: it names the parameter that differs
        self.engine.load_state_dict(kif["engine"])
        super().load_state_dict({name: state_dict[name] for name in ("state", "param_groups")})
        self.inner_done, self.last_lr = kif["inner_done"], kif["last_lr"]
        if self.memory is not None:
            self.memory.load_state_dict(kif["memory"])


class _Rounds(TrainerCallback):
    """Ends the trainer's rounds. After the optimizer's step and before the schedule's, checkpoints and evaluation."""

    def __init__(self, trainer: KIFMixin) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        optimizer = self.trainer.kif_optimizer
        scheduled = getattr(kwargs.get("lr_scheduler"), "optimizer", optimizer)
        # accelerate's wrapper shows the groups of what it wraps
        if scheduled.param_groups is not optimizer.param_groups:
            raise ValueError(f"the scheduler is of another optimizer than Recurrent-KIF's: {_SCHEDULE}")
        # before the Trainer restores the random numbers of a checkpoint
        if optimizer.memory is not None:
            optimizer.memory.open()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        optimizer = self.trainer.kif_optimizer
        last = state.global_step + 1 >= state.max_steps
        if optimizer.inner_done and (last or optimizer.inner_done >= optimizer.engine.config.inner_steps):
            self.trainer.end_round()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # stopped early; the best checkpoint's weights, if they were loaded, are not those of the round
        best = args.load_best_model_at_end and state.best_model_checkpoint is not None
        if self.trainer.kif_optimizer.inner_done and not best:
            self.trainer.end_round()


class KIFMixin:
    """Recurrent-KIF for a subclass of Trainer: `class Mine(KIFMixin, SFTTrainer)`. `train()` trains one task.

    Rounds of Q inner steps on `train_dataset` and M outer steps on `memory_dataset`, each round fused; the last round
    of the task may have fewer inner steps. Without memory every step is plain AdamW, as for the first task.
    `global_step` counts inner steps. Weights are the method's own at the end of a round; a checkpoint, evaluation or
    `load_best_model_at_end` within one sees those of the inner loop, so make `save_steps` and `eval_steps` multiples of
    Q. Checkpoints continue bit for bit anywhere, also within a round, unless datasets or collator draw random numbers.
    A second `train()` starts the next task.

    Several processes: the Trainer's data-parallel training. DeepSpeed, FSDP and DataParallel are refused.

    Args:
        args: training arguments with those of `KIFArguments`.
        memory_dataset: rows of earlier tasks, in the form of the Trainer's (prepared) train_dataset; they are batched,
            shuffled and collated as these. See `draw_memory`.
        Others as the Trainer; it makes the optimizer itself, and `create_scheduler` the schedule.

    Raises: TypeError for other arguments; ValueError for an optimizer or a scheduler of another one, DeepSpeed, FSDP,
        DataParallel, and for answers (GRPO, RLOO) that are used in several steps.
    """

    def __init__(self, model: Any = None, args: Any = None, *more: Any, memory_dataset: Any = None, **kwargs: Any):
        if not isinstance(args, KIFArguments):
            raise TypeError(
                f"args must be KIFTrainingArguments, or of a class derived from KIFArguments, got {type(args).__name__}"
            )
        given = (*(kwargs.get("optimizers") or ()), kwargs.get("optimizer_cls_and_kwargs"))
        if any(entry is not None for entry in given):
            raise ValueError(f"Recurrent-KIF makes the optimizer: leave out optimizers; {_SCHEDULE}")
        self.memory_dataset = memory_dataset
        self.kif_optimizer: KIFOptimizer
        if more:
            super().__init__(model, args, *more, **kwargs)  # type: ignore[call-arg]
        else:
            # trainers of TRL that take reward functions have them in the second place
            super().__init__(model, args=args, **kwargs)  # type: ignore[call-arg]
        trainer: Any = self
        if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
            raise ValueError(_sharded("DeepSpeed" if trainer.is_deepspeed_enabled else "FSDP"))
        if trainer.args.n_gpu > 1:
            raise ValueError(
                f"this process sees {trainer.args.n_gpu} GPUs, which the Trainer would use by DataParallel: "
                "start one process for each with torchrun, or set CUDA_VISIBLE_DEVICES to one"
            )
        _check_generation(trainer.args)
        # before the caller's, which may save the model in on_train_end
        trainer.callback_handler.callbacks.insert(0, _Rounds(self))

    @property
    def engine(self) -> RecurrentKIF:
        """The engine of the task in training or trained last. Raises: AttributeError before `train()`."""
        if not hasattr(self, "kif_optimizer"):
            raise AttributeError("there is no engine yet: train() makes it, when training begins")
        return self.kif_optimizer.engine

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()  # type: ignore[misc]
        # the Trainer clips through this; the engine clips within its step and scores the gradient as it was
        self.accelerator.clip_grad_norm_ = self._gradient_norm  # type: ignore[attr-defined]

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """A new arena and engine for the task; the Trainer calls it when training begins."""
        trainer: Any = self
        args, model = trainer.args, trainer.model if model is None else model
        # they may have been set since (args.set_optimizer)
        _check_optimization(args)
        optimizer = OptimizerConfig(
            betas=(args.adam_beta1, args.adam_beta2),
            eps=args.adam_epsilon,
            weight_decay=args.weight_decay,
            # below 0 the Trainer does not clip either
            max_grad_norm=max(args.max_grad_norm, 0.0),
        )
        _adapter_in_fp32(model)
        # since the last log, of this task alone: a task's last round may end after its last log
        self._memory_loss, self._memory_steps = None, 0
        self.kif_optimizer = KIFOptimizer(
            model, kif_config(args.kif), optimizer, args.learning_rate, self._memory_stream()
        )
        trainer.optimizer = self.kif_optimizer
        return self.kif_optimizer

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        self.kif_optimizer.attach_gradients()
        with without_cudnn():
            loss: Tensor = super().training_step(*args, **kwargs)  # type: ignore[misc]
        return loss

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        with without_cudnn():
            return super().prediction_step(*args, **kwargs)  # type: ignore[misc]

    def end_round(self) -> None:
        """The outer steps of the round and its fusion; called by the training loop."""
        optimizer, args = self.kif_optimizer, self.args  # type: ignore[attr-defined]
        scale = 1.0 if args.outer_learning_rate is None else args.outer_learning_rate / args.learning_rate
        for _ in range(optimizer.engine.config.outer_steps):
            with self._metrics_kept():
                self._backward_on_memory()
            optimizer.engine.outer_step(optimizer.last_lr * scale)
        optimizer.engine.fuse()
        optimizer.inner_done = 0

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The Trainer's, with `memory_loss` (mean over outer steps since the last log), `skipped` (steps whose gradient
        was not finite) and the fractions of elements that masks `kept` (means over the task's rounds).
        """
        if "loss" in logs:
            engine = self.engine
            logs["skipped"] = int(engine.skipped.item())
            if self._memory_loss is not None:
                trainer: Any = self
                logs["memory_loss"] = trainer.accelerator.gather(self._memory_loss).mean().item() / self._memory_steps
                total = engine.rounds * engine.arena.numel
                kept = zip(("inner", "outer", "both"), engine.kept.tolist(), strict=True)
                logs |= {f"kept_{mask}": count / total for mask, count in kept}
                self._memory_loss, self._memory_steps = None, 0
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def draw_memory(self, fraction: float = 0.02, *, name: str = "task", labels: Sequence[str] | None = None) -> Any:
        """The next task's `memory_dataset`: this one's and rows of `train_dataset`, drawn by `kif.memory`.

        Args:
            fraction: share of the rows that is drawn, between 0 and 1 and neither of them; at least one row.
            name: the draw depends on this and on `args.seed`.
            labels: a label for each row, to draw evenly over them.
        Returns: a `datasets.Dataset` where both are such, else a torch dataset.
        Raises: TypeError for a dataset without a length; ValueError for another fraction.
        """
        dataset = self.train_dataset  # type: ignore[attr-defined]
        if not hasattr(dataset, "__len__"):
            raise TypeError("memory cannot be drawn from a dataset without a length")
        memory = ReplayMemory(fraction, labels is not None, self.args.seed)  # type: ignore[attr-defined]
        memory.add(name, range(len(dataset)), [""] * len(dataset) if labels is None else labels)  # type: ignore[arg-type]
        drawn = memory.indices[name]
        old = [] if self.memory_dataset is None else [self.memory_dataset]
        if all(hasattr(part, "select") for part in (dataset, *old)):
            from datasets import concatenate_datasets

            return concatenate_datasets([*old, dataset.select(drawn)])
        return ConcatDataset([*old, Subset(dataset, drawn)])

    def _memory_stream(self) -> MemoryStream | None:
        memory = self.memory_dataset
        if memory is None or (hasattr(memory, "__len__") and len(memory) == 0):
            return None
        # whatever the Trainer does with training rows (columns, sampler, collator, processes), it does with these
        trainer: Any = self
        new_rows, trainer.train_dataset = trainer.train_dataset, memory
        try:
            with _memory_at_fault():
                seed = trainer.args.seed if trainer.args.data_seed is None else trainer.args.data_seed
                return MemoryStream(trainer.get_train_dataloader(), seed)
        finally:
            trainer.train_dataset = new_rows

    @contextmanager
    def _metrics_kept(self) -> Iterator[None]:
        """What TRL's trainers note at every loss, for their logs, is of new rows alone: put back as it was."""
        trainer: Any = self
        own = vars(trainer)
        noted = {name: own[name] for name in ("_metrics", "_logs") if isinstance(own.get(name), dict)}
        tokens, seen = getattr(trainer, "_total_train_tokens", None), trainer.state.num_input_tokens_seen
        own.update(_copied(noted))
        try:
            yield
        finally:
            own.update(noted)
            trainer.state.num_input_tokens_seen = seen
            if tokens is not None:
                trainer._total_train_tokens = tokens

    def _backward_on_memory(self) -> None:
        """The gradient of one outer step, accumulated and averaged as the Trainer does it for its own steps."""
        trainer: Any = self
        args, model = trainer.args, trainer.model_wrapped
        if hasattr(trainer, "_last_loaded_step"):
            # TRL gives vLLM the weights once a step by the count, which outer steps do not raise
            trainer._last_loaded_step = -1
        batches, items = trainer.get_batch_samples(
            self.kif_optimizer.memory, args.gradient_accumulation_steps, args.device
        )
        trainer.current_gradient_accumulation_steps = len(batches)
        for number, batch in enumerate(batches, 1):
            with nullcontext() if number == len(batches) else trainer.accelerator.no_sync(model=model):
                loss = trainer.training_step(model, batch, items)
            self._memory_loss = loss if self._memory_loss is None else self._memory_loss + loss
        self._memory_steps += 1

    def _gradient_norm(self, parameters: Any, max_norm: float, norm_type: float = 2.0) -> Tensor:
        """The gradient's norm, for the log; nothing is clipped."""
        norm: Tensor = torch.linalg.vector_norm(self.engine.arena.grad, norm_type)
        return norm


class KIFTrainer(KIFMixin, Trainer):
    """transformers' Trainer with Recurrent-KIF; see `KIFMixin`."""


class KIFSeq2SeqTrainer(KIFMixin, Seq2SeqTrainer):
    """transformers' Seq2SeqTrainer with Recurrent-KIF; see `KIFMixin`."""


def _copied(noted: Any) -> Any:
    """A copy of dicts in dicts and of the lists in them, whose entries are the same."""
    result = copy(noted)
    if isinstance(noted, dict):
        result.update({name: _copied(entry) for name, entry in noted.items()})
    return result


def _adapter_in_fp32(model: nn.Module) -> None:
    """Trainable parameters of PEFT's layers in fp32, which TRL casts to bf16 on a quantised base."""
    if not is_peft_available():
        return
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in model.modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        for kind in module.adapter_layer_names:
            # by kind, since the layer holds its base layer too
            held = getattr(module, kind, None)
            for parameter in held.parameters() if isinstance(held, nn.Module) else ():
                if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
                    parameter.data = parameter.data.float()


def _check_optimization(args: Any) -> None:
    """Raise ValueError for fp16 and another optimizer than the engine's."""
    if args.fp16:
        raise ValueError("fp16 does not work with Recurrent-KIF: use bf16=True or fp32")
    if args.optim not in OPTIMIZERS or args.optim_args or args.optim_target_modules:
        raise ValueError(
            f"optim={getattr(args.optim, 'value', args.optim)!r} does not work with Recurrent-KIF, which has AdamW "
            "with importances in one pass: leave out optim, optim_args and optim_target_modules"
        )


def _check_generation(args: Any) -> None:
    """Raise ValueError where answers that TRL generates would be used in several steps, an outer one among them."""
    steps = (getattr(args, "steps_per_generation", None) or 1) * getattr(args, "num_iterations", 1)
    if args.gradient_accumulation_steps % steps:
        raise ValueError(
            f"answers generated for {steps} passes would be used in several steps, and outer steps need those of their "
            "own rows: leave out steps_per_generation, generation_batch_size and num_iterations"
        )


def _sharded(name: str) -> str:
    return (
        f"{name} does not work with Recurrent-KIF, whose engine holds all trainable parameters in one buffer of each "
        "process: use plain data-parallel training (torchrun)"
    )

"""Configuration as plain dataclasses: `KIFConfig` for the method, `RunConfig` for a whole run.

Standard library only, so that the engine can be used without the command line. YAML and command-line
overrides are in `kif.configfile`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from math import isfinite
from numbers import Integral, Real
from typing import Any, Literal, get_args, get_origin, get_type_hints


@dataclass
class KIFConfig:
    """Switches of Recurrent-KIF. The defaults are the paper's text; `preset` gives the named sets.

    Args:
        inner_steps: Q, inner steps on the new task in a round (section 4, "Training Details").
        outer_steps: M, outer steps on replay memory in a round (1 in the text, 4 in Table 8).
        alpha1: EMA factor of the inner importance, I <- alpha1 * I + (1 - alpha1) * |w * grad| (Eq. 4).
        alpha2: EMA factor of the outer importance (Eq. 7); what it multiplies is `alpha2_weighs`.
        alpha2_weighs: `new`: I <- alpha2 * |w * grad| + (1 - alpha2) * I (Eq. 7); `old`: the other way round
            (released code).
        score: `ema`: the EMA itself is thresholded (Eq. 8); `ema_uncertainty`: EMA * U, where U is the EMA of
            | |w * grad| - EMA | (released code, as in AdaLoRA).
        uncertainty_decay: EMA factor of U; used by `score=ema_uncertainty` only.
        importance_of: `weight_gradient`: |w * grad| (Eq. 3); `gradient`: |grad| alone (Table 10).
        history: `dynamic`: the outer importance is updated in every outer step (Eq. 7); `frozen`: it stays as it is
            after the first round of each task ("- DIE", Table 2).
        importance_at: `gradient`: w is the weight at which the gradient was taken, and the gradient is the
            loss's own (Eq. 3); `update`: w after the optimizer step with the clipped gradient (released code).
        density: fraction of elements a mask keeps (20% in section 3.2).
        threshold_scope: `global`: one threshold over all elements of all tensors; `tensor`: one per tensor.
        threshold: `kth_largest`: an element of the scores, the ceil(density * n)-th largest (Eq. 8); `approximate`:
            the same on the CPU; with the kernels up to 0.001 * n elements more or fewer are kept, in fewer passes;
            `interpolated`: the (1 - density) quantile with linear interpolation (released code).
        mask: `at_least`: I >= threshold (Eq. 8); `above`: I > threshold (released code).
        fusion: name of the 2x2 weight table of (inner task vector, outer task vector) by the two masks, see
            `kif_kernels.FUSION_TABLES`: `paper` (Eq. 9), `released-code`, `no-share` ("- Share", Table 2),
            `no-masks` ("- KI", Table 2: both task vectors whole, that is plain alternating training). Without masks,
            each task vector weighted by its share of the importance, I_in / (I_in + I_out): `global-merge` of the
            sums over all elements ("+ GM"), `adaptive` of each element ("+ Adaptive").
        outer_optimizer: `own`: the outer loop has its own AdamW moments; `shared`: it shares the inner ones
            (released code).
    """

    inner_steps: int = 8
    outer_steps: int = 1
    alpha1: float = 0.55
    alpha2: float = 0.55
    alpha2_weighs: Literal["new", "old"] = "new"
    score: Literal["ema", "ema_uncertainty"] = "ema"
    uncertainty_decay: float = 0.85
    importance_of: Literal["weight_gradient", "gradient"] = "weight_gradient"
    history: Literal["dynamic", "frozen"] = "dynamic"
    importance_at: Literal["gradient", "update"] = "gradient"
    density: float = 0.2
    threshold_scope: Literal["global", "tensor"] = "global"
    threshold: Literal["kth_largest", "approximate", "interpolated"] = "kth_largest"
    mask: Literal["at_least", "above"] = "at_least"
    fusion: Literal["paper", "released-code", "no-share", "no-masks", "global-merge", "adaptive"] = "paper"
    outer_optimizer: Literal["own", "shared"] = "own"

    def __post_init__(self) -> None:
        _check_values("kif.", self)
        for name in ("inner_steps", "outer_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"kif.{name} must be at least 1, got {getattr(self, name)}")
        for name in ("alpha1", "alpha2", "uncertainty_decay", "density"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"kif.{name} must lie in [0, 1], got {getattr(self, name)}")

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> KIFConfig:
        """A named set of switches, with `overrides` on top. Raises ValueError for an unknown name."""
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}; there are {', '.join(PRESETS)}")
        return cls(**{**PRESETS[name], **overrides})


PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "released-code": {
        "outer_steps": 4,
        "alpha1": 0.85,
        "alpha2": 0.85,
        "alpha2_weighs": "old",
        "score": "ema_uncertainty",
        "uncertainty_decay": 0.85,
        "importance_at": "update",
        "threshold": "interpolated",
        "mask": "above",
        "fusion": "released-code",
        "outer_optimizer": "shared",
    },
    "no-die": {"history": "frozen"},
    "no-ki": {"fusion": "no-masks"},
    "no-share": {"fusion": "no-share"},
    "gm": {"fusion": "global-merge"},
    "adaptive": {"fusion": "adaptive"},
    "gradient-importance": {"importance_of": "gradient"},
    "no-ema": {"alpha1": 0.0, "alpha2": 1.0},
    "single-step": {"inner_steps": 10**9},
}
"""Named sets of switches: the paper, the authors' released code, and the ablations of the paper: Table 2 (`no-die`,
`no-ki`, `no-share`, `gm`, `adaptive`), Table 10 (`gradient-importance`, `no-ema`) and Figure 6 (`single-step`, which
fuses once, at the end of a task)."""


@dataclass
class EWCConfig:
    """Elastic weight consolidation.

    Args:
        strength: lambda, weight of the penalty.
        decay: gamma, factor of the old Fisher information when a task's own is added to it.
        fisher_rows: rows of a finished task whose gradients the Fisher information is the mean square of.
    """

    strength: float = 1000.0
    decay: float = 1.0
    fisher_rows: int = 200

    def __post_init__(self) -> None:
        _check("ewc", self, at_least_0=("strength",), fractions=("decay",), positive=("fisher_rows",))


@dataclass
class OLoRAConfig:
    """Orthogonal subspaces.

    Args:
        orthogonal: lambda_1, weight of the overlap of the new A with the old ones.
        norm: lambda_2, weight of the norm of the new A and B.
    """

    orthogonal: float = 0.5
    norm: float = 0.0

    def __post_init__(self) -> None:
        _check("olora", self, at_least_0=("orthogonal", "norm"))


@dataclass
class MoELoRAConfig:
    """Mixture of LoRA experts.

    Args:
        experts: K, LoRA experts in each layer, each of rank `lora_r`. Default: the number of tasks.
        balance: weight of the term that evens out how often experts are used.
    """

    experts: int | None = None
    balance: float = 0.0

    def __post_init__(self) -> None:
        _check("moelora", self, at_least_0=("balance",))
        if self.experts is not None and self.experts < 1:
            raise ValueError(f"moelora.experts must be positive, got {self.experts}")


@dataclass
class SAPTConfig:
    """Shared attention over the tasks' LoRA pairs.

    Args:
        bottleneck: width of the network that turns an input into a query.
        strength: weight of the divergence from the weights that old tasks' inputs had.
        pseudo_rows: rows of each old task that a step compares.
    """

    bottleneck: int = 100
    strength: float = 0.1
    pseudo_rows: int = 8

    def __post_init__(self) -> None:
        _check("sapt", self, at_least_0=("strength",), positive=("bottleneck", "pseudo_rows"))


@dataclass
class TaSLConfig:
    """Task skill localization and consolidation.

    Args:
        decay: EMA factor of sensitivity and uncertainty.
        quantile: a unit is important above this quantile of the units' scores.
        current: weight of the current task where both models need a unit, and in the history of scores.
    """

    decay: float = 0.85
    quantile: float = 0.8
    current: float = 0.3

    def __post_init__(self) -> None:
        _check("tasl", self, fractions=("decay", "quantile", "current"))


@dataclass
class MIGUConfig:
    """Magnitude-based gradient updating.

    Args:
        quantile: fraction of a linear layer's outputs, those of smallest magnitude, that are not updated.
    """

    quantile: float = 0.7

    def __post_init__(self) -> None:
        _check("migu", self, fractions=("quantile",))


@dataclass
class VRMCLConfig:
    """Variance-reduced meta continual learning.

    Args:
        inner_lr: initial learning rate of the inner SGD steps, one for each parameter.
        inner_lr_lr: learning rate of these learning rates.
        momentum: s, how much of the last corrected meta-gradient is kept.
        outer_lr: eta, step size of the meta-update.
        inner_steps: inner steps between two meta-updates.
    """

    inner_lr: float = 0.1
    inner_lr_lr: float = 0.25
    momentum: float = 0.15
    outer_lr: float = 0.35
    inner_steps: int = 4

    def __post_init__(self) -> None:
        _check(
            "vrmcl", self, at_least_0=("inner_lr", "inner_lr_lr", "outer_lr"), fractions=("momentum",),
            positive=("inner_steps",),
        )  # fmt: skip


@dataclass
class L2PConfig:
    """Learning to prompt.

    Args:
        pool_size: prompts in the pool.
        prompt_length: vectors of a prompt.
        top_k: prompts that are put in front of an input.
        pull: weight of the term that draws the chosen keys towards the inputs.
        init: prompts begin `uniform`: uniformly in (-1, 1); `vocabulary`: as embeddings of random tokens. Keys always
            begin uniformly.
    """

    pool_size: int = 10
    prompt_length: int = 5
    top_k: int = 5
    pull: float = 0.1
    init: Literal["uniform", "vocabulary"] = "uniform"

    def __post_init__(self) -> None:
        _check("l2p", self, at_least_0=("pull",), positive=("pool_size", "prompt_length", "top_k"))
        if self.top_k > self.pool_size:
            raise ValueError(f"l2p.top_k must not exceed l2p.pool_size ({self.pool_size}), got {self.top_k}")


@dataclass
class LFPT5Config:
    """Lifelong few-shot prompt tuning.

    Args:
        prompt_length: vectors of the prompt.
        lm_weight: weight of the loss of writing the rows themselves.
        lm_length: longest row that is written, in tokens.
        kl_weight: weight of staying with the previous prompt's answers on pseudo rows.
        pseudo_candidates: rows that are written for each earlier task before a new one.
        pseudo_per_class: rows of these that are kept, at most, for each label.
    """

    prompt_length: int = 300
    lm_weight: float = 0.25
    lm_length: int = 128
    kl_weight: float = 0.01
    pseudo_candidates: int = 64
    pseudo_per_class: int = 2

    def __post_init__(self) -> None:
        _check(
            "lfpt5", self, at_least_0=("lm_weight", "pseudo_candidates", "pseudo_per_class"), fractions=("kl_weight",),
            positive=("prompt_length", "lm_length"),
        )  # fmt: skip


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _check_values(prefix: str, config: Any) -> None:
    """Raise ValueError for a field whose value is not of its type, or none of those that its type lists.

    Numbers of numpy become Python's, which YAML and JSON know.
    """
    for name, hint in _hints(config.__class__).items():
        value = getattr(config, name)
        if get_origin(hint) is Literal and value not in get_args(hint):
            raise ValueError(f"{prefix}{name} must be one of {', '.join(get_args(hint))}, got {value!r}")
        if not _fits(value, hint):
            kind = hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint)
            raise ValueError(f"{prefix}{name} must be of type {kind}, got {value!r}")
        if isinstance(value, Real) and type(value).__module__ != "builtins":
            setattr(config, name, int(value) if isinstance(value, Integral) else float(value))


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a field's type; lists may be tuples, and true and false are no numbers."""
    kind, inner = get_origin(hint), get_args(hint)
    if kind is Literal:
        return value in inner
    if kind is list:
        return isinstance(value, (list, tuple)) and all(_fits(item, inner[0]) for item in value)
    if kind is dict:
        return isinstance(value, dict) and all(_fits(k, inner[0]) and _fits(v, inner[1]) for k, v in value.items())
    if inner:
        return any(_fits(value, one) for one in inner)
    if hint is float:
        return isinstance(value, Real) and not isinstance(value, bool) and isfinite(value)
    return isinstance(value, Integral if hint is int else hint) and (hint is bool or not isinstance(value, bool))


def _check(
    section: str,
    config: Any,
    *,
    at_least_0: Sequence[str] = (),
    fractions: Sequence[str] = (),
    positive: Sequence[str] = (),
) -> None:
    _check_values(f"{section}.", config)
    for name in (*at_least_0, *fractions, *positive):
        value = getattr(config, name)
        if name in positive and value <= 0:
            raise ValueError(f"{section}.{name} must be positive, got {value}")
        if value < 0:
            raise ValueError(f"{section}.{name} must not be negative, got {value}")
        if name in fractions and value > 1:
            raise ValueError(f"{section}.{name} must lie in [0, 1], got {value}")


@dataclass
class RunConfig:
    """Everything that defines a run. Defaults follow Appendix D of the paper where it speaks.

    Args:
        method: name of the method, see `kif methods`; `kif` and `replay` are short for two of them.
        model: folder or hub name of the base model (T5-like, Llama-like or BERT-like).
        data: folder that holds the tasks, or `hub` for the Hugging Face hub. Default: the environment
            variable KIF_DATA.
        order: name of a task order in the folder's orders.json (1-6 are those of Table 12).
        tasks: names of the tasks in training order, instead of `order`.
        output: run folder to write; must not hold a run already, unless it is resumed.
        resume: continue the interrupted run in `output` from its last checkpoint, with otherwise equal settings.
        continue_from: folder of a finished run to continue with further tasks; on the command line also `--from`.
            What was learned, replay memory, method, model and adapter settings come from it.
        checkpoint_rounds: rounds between checkpoints within a task. Default: checkpoints at the end of tasks only.
        keep_checkpoints: how many of the last checkpoints are kept; where one is damaged, the one before is used.
        seed: seed of everything random (adapter init, dropout, shuffling, replay memory).
        device: `auto` (a GPU if there is one), `cpu`, `cuda`, `cuda:1`, ...
        precision: `fp32` or `bf16` for the base model; the adapter is fp32 always. `fp16` is refused.
        adapter_precision: `bf16`: products with the adapter's LoRA weights are taken in bf16 in training, without casts
            in each layer; weights, gradients and moments stay fp32. It needs `precision: bf16`.
        quantization: keep the base model's linear layers in 8 bits (`int8`, LLM.int8) or 4 bits (`nf4`, `fp4`), by
            bitsandbytes (pip install "recurrent-kif[bnb]"). `precision` is that of the rest and of the products (with
            int8 these are fp16 at most). Output layer, embeddings, norms and T5's `wo` stay as they are.
        shard_base: with several processes, split the frozen base model's layers over them (FSDP), for a model that one
            GPU does not hold; the adapter is whole in each, and the result is the same.

        lora_r: rank of the adapter.
        lora_alpha: LoRA scaling numerator; the scale is lora_alpha / lora_r.
        lora_dropout: dropout on the adapter's input.
        use_rslora: scale by lora_alpha / sqrt(lora_r) instead (rsLoRA).
        rank_pattern: ranks of single layers, which then have lora_alpha over theirs as scale. A key is a layer's name,
            its ending after a dot, or a regular expression for these; the first that fits holds, as in PEFT.
        target_modules: names of the linear layers that get an adapter, or `all-linear`: all but the output layer.
            Default: query and value projections.
        modules_to_save: modules that are trained whole and saved with the adapter, such as norms or an output layer of
            its own; all whose names end so, as in PEFT.
        head: encoders only. `cosine`: class scores are 20 times the cosine of the pooled text with the label
            names' own embeddings by the base model; `linear`: a classification layer shared by all tasks,
            trained and saved with the adapter.
        label_space: encoders only. `union`: classes of all tasks compete in training and evaluation, as the
            words of a language model do; `task`: only those of the row's own task.

        template: prompt with the place {input} once and, if wanted, {instruction}. Default: that of the task folder.
        max_length: longest prompt in tokens; longer inputs are cut inside the text, not in the instruction.
        max_target_length: longest target in tokens.
        limit_train: use at most so many training rows of each task (a fixed random subset). Default: all.
        limit_eval: score at most so many rows of each task (a fixed random subset). Default: all.
        cache_dir: folder for tokenised texts. Default: `kif` in the user's cache folder.

        lr: peak learning rate, linear decay to 0 over the task's steps.
        outer_lr: peak learning rate of outer steps. Default: lr.
        epochs: passes over a task's training rows.
        steps_per_task: optimizer steps for each task, inner and outer together, instead of `epochs`.
        batch_size: rows in an optimizer step.
        outer_batch_size: rows in an outer step. Default: batch_size.
        gradient_accumulation: micro-batches an optimizer step is split into. The step's loss is the mean over
            all its label tokens (rows, for encoders), so this changes memory use and not the result (l2p, lfpt5,
            migu and moelora's balance term excepted, which look at each micro-batch by itself).
        gradient_checkpointing: keep only each layer's input for the backward pass and compute the rest again: less
            memory, more time, the same result up to rounding.
        cuda_graphs: record forward and backward pass as CUDA graphs, one for each of the few shapes that batches are
            then padded to, and replay them, one launch a pass; the same result up to rounding and the draws of dropout.
            For methods whose passes are the model's own; not with quantization, gradient_checkpointing, shard_base.
        use_liger_kernel: rotary positions and gated feed-forwards by liger-kernel (pip install "recurrent-kif[liger]"),
            in training, for Llama and its like on a GPU: less memory and time, the same result up to rounding.
        warmup_steps: inner steps of linear warm-up in each task; at most a tenth of the task's steps are used.
        weight_decay: decoupled weight decay of AdamW.
        beta1: AdamW decay of the first moment.
        beta2: AdamW decay of the second moment.
        eps: AdamW epsilon.
        max_grad_norm: global gradient norm is clipped to this; 0 turns clipping off.

        memory_fraction: share of a finished task's training rows that goes to replay memory; at least one row.
        memory_balanced: draw the memory rows evenly over the labels.
        memory_data: with `continue_from`: replay rows of the earlier tasks, instead of those that the continued run
            keeps; a file, folder or hub name that `datasets` reads, with the columns task, instruction, input, label.

        eval_split: rows to score: `test`, `validation`, or `heldout`, a part of train that is then not trained
            on. Select on `heldout` only: validation and test share rows in the public benchmarks.
        holdout: share of train held out when eval_split is `heldout`.
        eval_mode: `generate`: greedy decoding and exact match (lower case, stripped), as in the paper; `rank`:
            the label with the highest likelihood. Encoders always classify.
        eval_batch_size: rows scored at once.
        max_new_tokens: longest generated answer in tokens.
        eval_forward: also score each task before anything is trained and right before its own training, which
            gives forward transfer.

        kif: switches of Recurrent-KIF.
        ewc: hyperparameters of EWC.
        olora: hyperparameters of O-LoRA.
        moelora: hyperparameters of MoELoRA.
        sapt: hyperparameters of SAPT.
        tasl: hyperparameters of TaSL.
        migu: hyperparameters of MIGU.
        vrmcl: hyperparameters of VR-MCL.
        l2p: hyperparameters of L2P.
        lfpt5: hyperparameters of LFPT5.
    """

    model: str = ""
    method: str = "recurrent-kif"
    data: str | None = None
    order: str | None = None
    tasks: list[str] = field(default_factory=list)
    output: str = "runs/latest"
    resume: bool = False
    continue_from: str | None = None
    checkpoint_rounds: int | None = None
    keep_checkpoints: int = 2
    seed: int = 0
    device: str = "auto"
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    adapter_precision: Literal["fp32", "bf16"] = "fp32"
    quantization: Literal["none", "int8", "nf4", "fp4"] = "none"
    shard_base: bool = False

    lora_r: int = 8
    lora_alpha: int = 32
    lora_dropout: float = 0.05
    use_rslora: bool = False
    rank_pattern: dict[str, int] | None = None
    target_modules: list[str] | None = None
    modules_to_save: list[str] | None = None
    head: Literal["cosine", "linear"] = "cosine"
    label_space: Literal["union", "task"] = "union"

    template: str | None = None
    max_length: int = 512
    max_target_length: int = 128
    limit_train: int | None = None
    limit_eval: int | None = None
    cache_dir: str | None = None

    lr: float = 3e-4
    outer_lr: float | None = None
    epochs: int = 10
    steps_per_task: int | None = None
    batch_size: int = 8
    outer_batch_size: int | None = None
    gradient_accumulation: int = 1
    gradient_checkpointing: bool = False
    cuda_graphs: bool = False
    use_liger_kernel: bool = False
    warmup_steps: int = 50
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    max_grad_norm: float = 1.0

    memory_fraction: float = 0.02
    memory_balanced: bool = False
    memory_data: str | None = None

    eval_split: Literal["test", "validation", "heldout"] = "test"
    holdout: float = 0.1
    eval_mode: Literal["generate", "rank"] = "generate"
    eval_batch_size: int = 32
    max_new_tokens: int = 128
    eval_forward: bool = False

    kif: KIFConfig = field(default_factory=KIFConfig)
    ewc: EWCConfig = field(default_factory=EWCConfig)
    olora: OLoRAConfig = field(default_factory=OLoRAConfig)
    moelora: MoELoRAConfig = field(default_factory=MoELoRAConfig)
    sapt: SAPTConfig = field(default_factory=SAPTConfig)
    tasl: TaSLConfig = field(default_factory=TaSLConfig)
    migu: MIGUConfig = field(default_factory=MIGUConfig)
    vrmcl: VRMCLConfig = field(default_factory=VRMCLConfig)
    l2p: L2PConfig = field(default_factory=L2PConfig)
    lfpt5: LFPT5Config = field(default_factory=LFPT5Config)

    def __post_init__(self) -> None:
        for name in ("model", "data", "output", "continue_from", "memory_data", "cache_dir"):
            if isinstance(getattr(self, name), os.PathLike):
                setattr(self, name, os.fspath(getattr(self, name)))
        _check_values("", self)
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must lie in [0, 2^32), got {self.seed}")
        positive = (
            "lora_r", "lora_alpha", "max_length", "max_target_length", "limit_train", "limit_eval", "epochs",
            "steps_per_task", "batch_size", "outer_batch_size", "gradient_accumulation", "eval_batch_size",
            "max_new_tokens", "lr", "outer_lr", "eps", "checkpoint_rounds", "keep_checkpoints",
        )  # fmt: skip
        for name in positive:
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} must be positive, got {value}")
        for name in ("warmup_steps", "weight_decay", "max_grad_norm"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("beta1", "beta2", "lora_dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name} must lie in [0, 1), got {getattr(self, name)}")
        for name in ("memory_fraction", "holdout"):
            if not 0.0 < getattr(self, name) < 1.0:
                raise ValueError(f"{name} must lie above 0 and below 1, got {getattr(self, name)}")
        for key, rank in (self.rank_pattern or {}).items():
            if rank <= 0:
                raise ValueError(f"rank_pattern must hold positive ranks, got {rank} for {key!r}")
        if "all-linear" in (self.target_modules or ()) and len(self.target_modules or ()) > 1:
            raise ValueError("target_modules must hold all-linear alone, which is all layers already")
        if self.template is not None and self.template.count("{input}") != 1:
            raise ValueError(f"template must hold {{input}} once, got {self.template!r}")
        if self.adapter_precision == "bf16" and self.precision != "bf16":
            raise ValueError(f"adapter_precision bf16 needs precision bf16, got precision {self.precision}")
        if self.shard_base and self.quantization != "none":
            raise ValueError(f"shard_base cannot split a quantised base: leave out quantization {self.quantization}")
        for name in ("quantization", "gradient_checkpointing", "shard_base"):
            if self.cuda_graphs and getattr(self, name) not in (False, "none"):
                raise ValueError(f"cuda_graphs does not work with {name}: leave one of them out")
        if self.order is not None and self.tasks:
            raise ValueError("give either order or tasks, not both")


SECTIONS: dict[str, type] = {
    "kif": KIFConfig,
    "ewc": EWCConfig,
    "olora": OLoRAConfig,
    "moelora": MoELoRAConfig,
    "sapt": SAPTConfig,
    "tasl": TaSLConfig,
    "migu": MIGUConfig,
    "vrmcl": VRMCLConfig,
    "l2p": L2PConfig,
    "lfpt5": LFPT5Config,
}
"""Parts of a RunConfig that belong to single methods, by field."""

"""Recipe keys: what exists, what it means, what it may be. Reading and error texts: `recipe.py`.

Keys that timm's training script knows are named as there. Every key has a description, and the descriptions
are the reference that users read. Checks between keys hang on the later key, so that they run even if other
keys are wrong.
"""

from __future__ import annotations

import itertools
import math
import re
from fractions import Fraction
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from stepping_plugin.errors import SteppingError, nearest
from stepping_plugin.runs.recipe_data import (
    BATCH,
    EPOCHS,
    FOLDERS,
    LR,
    SEED,
    SUBNETS,
    TORCH_SETS,
    UPDATES,
    DataConfig,
    Section,
    key,
)
from stepping_plugin.training.criteria import CRITERIA
from stepping_plugin.training.targets import parse_target
from stepping_plugin.units.levels import BUDGET_TEXT, SUFFIX

__all__ = [
    "FOLDERS",
    "TORCH_SETS",
    "Construction",
    "DataConfig",
    "ModelConfig",
    "Recipe",
    "Retrain",
    "Section",
    "Train",
]

_DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", re.ASCII)
_SCHEDULES = Literal["cosine", "tanh", "step", "multistep", "poly", "wsd", "rsqrt", "constant", "none"]


_ELSEWHERE = {"num_classes": "the data set (data.num_classes where it does not tell)", "in_chans": "the data set",
              "img_size": "data.img_size", "pretrained": "pretrained beside kwargs",
              "checkpoint_path": "checkpoint_path beside kwargs"}  # fmt: skip


class TeacherConfig(Section):
    """A model by timm name."""

    name: str | None = key(None, "timm model, for example resnet18, lenet5 or vit_tiny_patch16_224.augreg_in21k")
    pretrained: bool = key(False, "start from timm's pretrained weights (downloads them)")
    checkpoint_path: str | None = key(None, ".safetensors file of weights to start from")
    kwargs: dict[str, Any] = key({}, "further arguments of timm.create_model, for example width_mult or drop_path_rate")

    @field_validator("kwargs")
    @classmethod
    def _only_of_the_model(cls, kwargs: dict[str, Any]) -> dict[str, Any]:
        """What has a key of its own, and what names files or addresses to read."""
        for name in kwargs:
            if name in _ELSEWHERE:
                raise ValueError(f"{name} is set by {_ELSEWHERE[name]}: remove it here")
            if name.startswith(("pretrained", "checkpoint", "cache")):
                raise ValueError(f"{name}: files of weights are named by checkpoint_path beside kwargs only")
        return kwargs

    @field_validator("name")
    @classmethod
    def _timm_knows_it(cls, name: str | None) -> str | None:
        import timm

        import stepping_plugin.integrations.timm  # noqa: F401 (registers the paper's networks)

        if name is not None and ":" not in name and not timm.is_model(name.split(".")[0]):  # hf-hub:... is timm's
            raise ValueError(f"timm has no model {name!r}; {_closest(name, timm.list_models(), 'timm.list_models()')}")
        return name


class ModelConfig(TeacherConfig):
    """What is to become a SteppingNet: a timm model, or a net saved before, which then skips construction."""

    net: str | None = key(None, "a saved SteppingNet to go on from: only retraining is done", validate_default=True)

    @field_validator("net")
    @classmethod
    def _name_or_net(cls, net: str | None, info: ValidationInfo) -> str | None:
        if "name" in info.data and (info.data["name"] is None) == (net is None):
            raise ValueError("give either model.name (a timm model) or model.net (a saved SteppingNet)")
        return net


class Optimisation(Section):
    """One optimizer and its batches."""

    batch_size: int = key(128, "per process", ge=1, le=BATCH)
    opt: str = key("sgd", "timm optimizer")
    lr: float = key(0.05, "learning rate", gt=0, le=LR)
    momentum: float = key(0.9, "of optimizers that have one", ge=0, lt=1)
    weight_decay: float = key(5e-4, "not applied to biases and norms", ge=0, le=100)
    clip_grad: float | None = key(None, "largest norm of the gradient; null: not clipped", gt=0, le=1e9)
    grad_accum_steps: int = key(1, "batches per optimizer step", ge=1, le=UPDATES)
    amp: bool = key(False, "mixed precision")
    amp_dtype: Literal["float16", "bfloat16"] = key("bfloat16", "of mixed precision")

    @field_validator("opt")
    @classmethod
    def _timm_knows_it(cls, opt: str) -> str:
        from timm.optim import list_optimizers

        names = [str(name) for name in list_optimizers()]
        if opt.lower().removeprefix("lookahead_") not in names:
            raise ValueError(f"timm has no optimizer {opt!r}; {_closest(opt, names, 'timm.optim.list_optimizers()')}")
        return opt


class Train(Optimisation):
    """Training of the original network. With `epochs: 0` it is used as it comes (pretrained)."""

    epochs: int = key(10, "0: no training", ge=0, le=EPOCHS)
    validation_batch_size: int | None = key(None, "null: batch_size", ge=1, le=BATCH)
    sched: _SCHEDULES = key("cosine", "timm schedule of the learning rate")
    sched_on_updates: bool = key(True, "the schedule moves at every step, not only at every epoch")
    warmup_epochs: int = key(0, "of linear warm-up", ge=0, le=EPOCHS)
    warmup_lr: float = key(1e-5, "at which the warm-up begins", ge=0, le=LR)
    min_lr: float = key(0.0, "at which the schedule ends", ge=0, le=LR)
    cooldown_epochs: int = key(0, "at min_lr, after the schedule", ge=0, le=EPOCHS)
    decay_epochs: float | None = key(
        None, "period of sched: step, length of the decay of wsd and rsqrt; null: timm's default", gt=0, le=EPOCHS
    )
    decay_milestones: list[Annotated[int, Field(ge=1, le=EPOCHS)]] = key(
        [], "epochs of sched: multistep", validate_default=True, max_length=1000
    )
    decay_rate: float = key(0.1, "of sched: step and multistep; power of poly", gt=0, le=100)
    smoothing: float = key(0.0, "label smoothing", ge=0, lt=1)
    loss: str = key(
        "cross_entropy",
        "learned from labels: cross_entropy, binary (sigmoid, any number of labels per picture), focal, or "
        "package.module.name of a function of scores (B, classes) and labels; retrain.loss is the construction's, too",
        max_length=200,
    )
    focal_gamma: float = key(2.0, "of loss: focal; 0: cross entropy", ge=0, le=100)
    model_ema: bool = key(False, "keep and report an exponential moving average of the weights")
    model_ema_decay: float = key(0.9998, "of the moving average", gt=0, lt=1)
    checkpoint_steps: int | None = key(
        None, "save also after every so many updates; null: after every epoch only", ge=1, le=UPDATES
    )
    channels_last: bool = key(False, "memory layout of images and weights; faster for convolutions on some devices")
    torchcompile: bool = key(False, "train through torch.compile; the first updates take minutes")

    @field_validator("loss")
    @classmethod
    def _criterion_or_path(cls, loss: str, info: ValidationInfo) -> str:
        if loss in CRITERIA:
            return loss
        if not _DOTTED.fullmatch(loss):
            raise ValueError(f"{nearest(loss, CRITERIA)}; a function of your own is named package.module.name")
        if info.data.get("smoothing"):
            raise ValueError("a function of your own gets the labels as they are: remove smoothing")
        return loss

    @field_validator("focal_gamma")
    @classmethod
    def _only_of_focal(cls, gamma: float, info: ValidationInfo) -> float:
        if gamma != cls.model_fields["focal_gamma"].default and info.data.get("loss", "focal") != "focal":
            raise ValueError(f"has no effect with loss: {info.data['loss']}; remove it, or set loss: focal")
        return gamma

    @field_validator("warmup_epochs")
    @classmethod
    def _within_the_training(cls, warmup: int, info: ValidationInfo) -> int:
        epochs = info.data.get("epochs")
        if epochs and warmup > epochs:
            raise ValueError(f"longer than the training, epochs: {epochs}")
        return warmup

    @field_validator("decay_epochs")
    @classmethod
    def _fits_the_schedule(cls, decay: float | None, info: ValidationInfo) -> float | None:
        """As timm asks for it when the training begins, which may be hours later."""
        epochs, left = info.data.get("epochs"), (info.data.get("epochs") or 0) - info.data.get("warmup_epochs", 0)
        if epochs and decay is not None and decay >= 1 and info.data.get("sched") in ("wsd", "rsqrt") and decay > left:
            raise ValueError(f"longer than the {left} epochs after the warm-up")
        return decay

    @field_validator("decay_milestones")
    @classmethod
    def _ascending(cls, milestones: list[int], info: ValidationInfo) -> list[int]:
        if milestones != sorted(set(milestones)):
            raise ValueError("milestones must ascend")
        if info.data.get("sched") == "multistep" and not milestones:
            raise ValueError("sched: multistep needs decay_milestones, for example [50, 75]")
        return milestones


class Construction(Optimisation):
    """How the subnets are found (Fig. 3 of the paper)."""

    flow: Literal["trajectory", "paper"] = key("trajectory", "how units move; paper: the literal rules of the paper")
    policy: Literal["steppingnet", "any-width", "random"] = key("steppingnet", "which units go to which level")
    iterations: int = key(30, "N_t of the paper", ge=1, le=EPOCHS)
    batches: int = key(10, "m of the paper: training batches per iteration", ge=0, le=UPDATES)
    cooldown_iterations: int = key(
        3, "after the last moves, train m batches so many times at a falling lr", ge=0, le=EPOCHS
    )
    expansion: Annotated[float, Field(ge=1, le=16)] | Literal["auto"] = key(
        "auto", "widen every layer by this factor before construction; auto: the least one that the budgets need"
    )
    noise: float = key(1.0, "how unequally copies of a widened unit share its outgoing weights", ge=0, le=1)
    copy_importance: float = key(0.1, "importance of second copies as a share of their own; 1: as any unit", ge=0, le=1)
    init: Literal["original", "random"] = key("original", "weights to start from; original: widened, same function")
    importance: Literal["per-sample", "per-batch", "magnitude", "random"] = key(
        "per-sample", "estimator of Eq. 2 and 3"
    )
    importance_batches: int = key(2, "batches per iteration on which Eq. 2 is evaluated", ge=1, le=UPDATES)
    alpha: float = key(1.5, "alpha_k = alpha ** (k - 1) of Eq. 3", ge=1e-3, le=1e3)
    beta: float = key(0.9, "suppression of weight updates (III-A2); 1: none", gt=0, le=1)
    threshold: float = key(1e-5, "weights below it are pruned; 0: none", ge=0, le=1)
    band: tuple[float, float] | None = key(
        (0.8, 1.25), "least and greatest width of a layer relative to the uniform pattern; null: free"
    )
    increments: tuple[float, float] | None = key(
        (0.5, 1.5), "the same for the units that a level adds; null: free; without a band: no effect"
    )
    round_to: Annotated[int, Field(ge=1, le=1024)] | Literal["auto"] = key(
        1, "channels that every level adds to a layer in multiples of, where it is wide enough; auto: measured"
    )
    latency: Literal["torch", "onnxruntime"] = key("torch", "runtime whose speed counts, for round_to: auto")
    rebirth: bool = key(True, "after the last moves, units that never fire get new incoming weights")
    updates: Literal["joint", "sequential"] = key("joint", "one pass for all subnets, or the paper's ascending order")
    reconstruct: int = key(
        0,
        "training pictures on which least squares brings the original's values back, before retraining; 0: none",
        ge=0,
        le=UPDATES,
    )

    @field_validator("band", "increments")
    @classmethod
    def _around_one(cls, band: tuple[float, float] | None) -> tuple[float, float] | None:
        if band is not None and not 0 <= band[0] <= 1 <= band[1]:
            raise ValueError("expected [low, high] with 0 <= low <= 1 <= high")
        return band


class Retrain(Train):
    """Training of the subnets after construction (III-B, Eq. 4)."""

    gamma: float = key(0.4, "weight of the cross entropy, 1 - gamma that of the teacher (Eq. 4)", ge=0, le=1)
    temperature: float = key(1.0, "of the distillation", ge=1e-3, le=1e3)
    subnet_weights: list[Annotated[float, Field(le=1e6)]] | None = key(
        None, "weight of every subnet's loss, smallest subnet first; null: all 1"
    )
    beta: float = key(0.9, "suppression of weight updates (III-A2); 1: none", gt=0, le=1)
    updates: Literal["joint", "sequential"] = key("joint", "one pass for all subnets, or the paper's ascending order")
    distill_from: Literal["original", "largest", "teacher", "none"] = key(
        "original", "original network, largest subnet, the model in `teacher`, or no distillation"
    )
    teacher: TeacherConfig | None = key(None, "model of distill_from: teacher", validate_default=True)

    @field_validator("subnet_weights")
    @classmethod
    def _not_negative(cls, weights: list[float] | None) -> list[float] | None:
        if weights is not None and not (all(0 <= w < math.inf for w in weights) and any(weights)):
            raise ValueError("expected numbers from 0 up, at least one above 0")
        return weights

    @field_validator("teacher")
    @classmethod
    def _belongs_to_distill_from(cls, teacher: TeacherConfig | None, info: ValidationInfo) -> TeacherConfig | None:
        source = info.data.get("distill_from")
        if source == "teacher" and (teacher is None or teacher.name is None):
            raise ValueError("distill_from: teacher needs teacher.name (a timm model)")
        if source not in (None, "teacher") and teacher is not None:
            raise ValueError(f"has no effect with distill_from: {source}; set distill_from: teacher")
        return teacher


class EarlyExit(Section):
    """Temperatures and thresholds, chosen on validation pictures, kept in the net: `predict(until="calibrated")`."""

    target: str | None = key(
        "accuracy >= 99 % of the largest subnet",
        "what to reach with the fewest MACs, or at what cost; `stepping thresholds --help` has all forms; null: none",
        max_length=500,
    )
    per_class: bool = key(False, "thresholds for every class that a subnet answers, where they pay")
    combine: Literal["last", "product"] = key("last", "the answer: the last subnet's, or the product of those so far")

    @field_validator("target")
    @classmethod
    def _readable(cls, target: str | None) -> str | None:
        try:
            return target and parse_target(target).text
        except SteppingError as error:
            raise ValueError(str(error)) from None

    @field_validator("per_class", "combine")
    @classmethod
    def _belongs_to_a_target(cls, value: Any, info: ValidationInfo) -> Any:
        default = cls.model_fields[str(info.field_name)].default
        if "target" in info.data and info.data["target"] is None and value != default:
            raise ValueError("has no effect with target: null")
        return value


class Recipe(Section):
    """One run, from the data to the report. Paths are relative to the current folder."""

    model: ModelConfig = key(..., "the network that is to become a SteppingNet")
    data: DataConfig = key(..., "the pictures that it learns from")
    budgets: list[float | int | str] = key(
        [],
        'ascending; numbers up to 1.0 and "40%": shares of the MACs; whole numbers and "300M": MACs',
        validate_default=True,
        max_length=SUBNETS,
    )
    train: Train = key(Train(), "training of the original", validate_default=True)
    construction: Construction = key(Construction(), "how the subnets are found")
    retrain: Retrain = key(Retrain(), "training of the subnets")
    early_exit: EarlyExit = key(EarlyExit(), "when to stop stepping")
    output: str | None = key(
        None, "folder of the results; null: runs/NAME-OF-THE-RECIPE", min_length=1, max_length=4096
    )
    seed: int = key(0, "of weights, order and augmentation", ge=0, le=SEED)
    log_with: list[Literal["csv", "tensorboard", "wandb"]] = key(
        [], "trackers of accelerate that get the figures of every epoch: csv, tensorboard, wandb", max_length=3
    )
    device: str = key("auto", "auto, cpu, mps, cuda or cuda:NUMBER", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")

    @field_validator("output")
    @classmethod
    def _a_path(cls, output: str | None) -> str | None:
        if output is not None and not output.isprintable():
            raise ValueError("expected a path without control characters")
        return output

    @field_validator("log_with", mode="before")
    @classmethod
    def _words(cls, names: Any) -> Any:
        """`log_with=csv,wandb` of a command line, and a single word, are lists too."""
        return [name.strip() for name in names.split(",")] if isinstance(names, str) else names

    @field_validator("log_with")
    @classmethod
    def _once_each(cls, names: list[str]) -> list[str]:
        if len(set(names)) < len(names):
            raise ValueError("one of them twice")
        return names

    @field_validator("budgets", mode="before")
    @classmethod
    def _listed(cls, budgets: Any) -> Any:
        """`budgets=0.1,0.3` of a command line, and a single number, are lists too."""
        if isinstance(budgets, str):
            return [_scalar(part.strip()) for part in budgets.split(",")]
        return budgets if isinstance(budgets, (list, tuple)) or budgets is None else [budgets]

    @field_validator("budgets")
    @classmethod
    def _well_formed(cls, budgets: list[float | int | str], info: ValidationInfo) -> list[float | int | str]:
        net_given = "model" in info.data and info.data["model"].net is not None
        if net_given and budgets:
            raise ValueError("the net in model.net has its budgets already: remove this key")
        if not budgets and not net_given and "model" in info.data:
            raise ValueError("expected ascending budgets, for example [0.1, 0.3, 0.5, 0.85]")
        problems = [text for budget in budgets if (text := _budget_problem(budget))]
        sizes = [] if problems else [_budget_size(budget) for budget in budgets]
        for unit in ("share", "MACs"):
            same = [size for kind, size in sizes if kind == unit]
            if any(low >= high for low, high in itertools.pairwise(same)):
                problems.append("budgets must ascend, each above the one before")
        if problems:
            raise ValueError("; ".join(problems))
        return budgets

    @field_validator("retrain")
    @classmethod
    def _one_weight_per_subnet(cls, retrain: Retrain, info: ValidationInfo) -> Retrain:
        budgets, weights = info.data.get("budgets"), retrain.subnet_weights
        if budgets and weights is not None and len(weights) != len(budgets):
            raise ValueError(f"subnet_weights: {len(weights)} numbers for {len(budgets)} budgets; one per budget")
        return retrain

    @field_validator("train")
    @classmethod
    def _something_is_trained(cls, train: Train, info: ValidationInfo) -> Train:
        model = info.data.get("model")
        if train.epochs == 0 and model and not (model.pretrained or model.checkpoint_path or model.net):
            raise ValueError("epochs: 0 needs a trained original: model.pretrained: true or model.checkpoint_path")
        return train


def _budget_problem(budget: float | int | str) -> str | None:
    """What is wrong with a single budget, or None."""
    if isinstance(budget, str):
        if BUDGET_TEXT.fullmatch(budget.strip()) is None:
            return f"{budget!r} is no budget: write 0.3, 40%, 300M, 1.2G or a whole number of MACs"
        unit, amount = _budget_size(budget)
        if amount == 0 or (unit == "share" and amount > 1):
            return f"{budget!r} is out of range: a share lies above 0 % and up to 100 %"
    elif isinstance(budget, float) and not 0 < budget <= 1:
        return f"{budget} is out of range: a share lies above 0 and up to 1.0; MACs are whole numbers"
    elif isinstance(budget, int) and budget <= 1:
        return f"{budget} would be a number of MACs: write {float(budget)} for a share of the original"
    return None


def _budget_size(budget: float | int | str) -> tuple[str, Fraction]:
    """("share" of the original or "MACs", amount), as `units.levels.parse_budgets` reads it."""
    if isinstance(budget, str):
        number, suffix = BUDGET_TEXT.fullmatch(budget.strip()).groups()  # type: ignore[union-attr]  # checked before
        if suffix == "%":
            return "share", Fraction(number) / 100
        kind = "share" if suffix is None and "." in number else "MACs"
        return kind, Fraction(number) * SUFFIX.get((suffix or "").lower(), 1)
    return ("share" if isinstance(budget, float) else "MACs"), Fraction(budget)


def _scalar(text: str) -> float | int | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def _closest(name: str, names: list[str], source: str) -> str:
    """`nearest`, without the whole list where it is long and has nothing close."""
    hint = nearest(name, names)
    return hint if hint.startswith("did you mean") else f"{source} lists all"

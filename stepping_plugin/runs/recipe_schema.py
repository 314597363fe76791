"""Recipe keys: what exists, what it means, what it may be. Reading and error texts: `recipe.py`.

Keys that timm's training script knows are named as there. Every key has a description, and the descriptions
are the reference that users read. Checks between keys hang on the later key, so that they run even if other
keys are wrong.
"""

from __future__ import annotations

import itertools
import math
import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from stepping_plugin.errors import nearest

__all__ = ["Construction", "DataConfig", "ModelConfig", "Recipe", "Retrain", "Train"]

TORCH_SETS = ("cifar10", "cifar100", "kmnist", "mnist", "qmnist")  # of torchvision, one array in memory
_KNOWN_SETS = ("digits", "fashion_mnist", "imagefolder", *TORCH_SETS)
_PREFIXES = ("torch/", "hfds/", "hfids/", "tfds/", "wds/")  # of timm.data.create_dataset
_SCHEDULES = Literal["cosine", "tanh", "step", "multistep", "poly", "wsd", "rsqrt", "constant", "none"]


def key(default: Any, description: str, **limits: Any) -> Any:
    return Field(default, description=description, **limits)


class Section(BaseModel):
    """Common to all sections: unknown keys, NaN and infinity are errors; values cannot be changed."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """pydantic would read `epochs: true` as 1."""
        if isinstance(value, bool) and "bool" not in str(cls.model_fields[str(info.field_name)].annotation):
            raise ValueError("true and false are not values of this key")
        return value


class TeacherConfig(Section):
    """A model by timm name."""

    name: str | None = key(None, "timm model, for example resnet18, lenet5 or vit_tiny_patch16_224.augreg_in21k")
    pretrained: bool = key(False, "start from timm's pretrained weights (downloads them)")
    checkpoint_path: str | None = key(None, ".safetensors file of weights to start from")
    kwargs: dict[str, Any] = key({}, "further arguments of timm.create_model, for example width_mult or drop_path_rate")

    @field_validator("name")
    @classmethod
    def _timm_knows_it(cls, name: str | None) -> str | None:
        import timm

        import stepping_plugin.integrations.timm  # noqa: F401 (registers the paper's networks)

        if name and ":" not in name and not timm.is_model(name.split(".")[0]):  # hf-hub:... is timm's to resolve
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


class DataConfig(Section):
    """Which pictures, how they are split and augmented."""

    name: str = key(..., "digits, fashion_mnist, cifar10, cifar100, mnist, imagefolder, or a name that timm opens")
    root: str | None = key(None, "folder of the data, relative to the current folder")
    download: bool = key(False, "let torchvision or the hub fetch the data")
    val_fraction: float | None = key(
        None, "share of the training set held out for validation; null: 0.1 in memory, 0 on disk", ge=0, lt=1
    )
    split_seed: int = key(0, "of the splits; apart from `seed`, so that runs with other seeds share them", ge=0)
    limit: int | None = key(None, "use only so many training samples", ge=1)
    img_size: int | None = key(None, "resize to this many pixels; null: as they are, or as the model wants them", ge=1)
    mean: list[float] | None = key(None, "per channel; null: of the training set, or as the model wants it")
    std: list[float] | None = key(None, "per channel; null: of the training set, or as the model wants it")
    hflip: float | None = key(None, "probability of a mirror image; null: what suits the set", ge=0, le=1)
    shift: int | None = key(None, "random shift in pixels, sets in memory only; null: what suits the set", ge=0)
    workers: int = key(4, "loader processes, sets on disk only", ge=0)
    train_split: str = key("train", "timm's name of the training split")
    val_split: str = key("validation", "timm's name of the test split")
    num_classes: int | None = key(None, "where the set does not tell", ge=2)
    scale: tuple[float, float] | None = key(None, "area range of timm's random crop, sets on disk only")
    ratio: tuple[float, float] | None = key(None, "aspect range of timm's random crop, sets on disk only")
    color_jitter: float | None = key(None, "of timm, sets on disk only", ge=0)
    aa: str | None = key(None, "timm's auto-augment, for example rand-m9-mstd0.5-inc1, sets on disk only")
    reprob: float = key(0.0, "probability of random erasing, sets on disk only", ge=0, le=1)
    crop_pct: float | None = key(None, "of the evaluation crop, sets on disk only", gt=0, le=1)
    interpolation: str | None = key(None, "of the evaluation resize, sets on disk only")

    @property
    def in_memory(self) -> bool:
        return _in_memory(self.name)

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in _KNOWN_SETS and not name.startswith(_PREFIXES):
            raise ValueError(
                f"no data set {name!r}; {nearest(name, _KNOWN_SETS)} (or a name starting with torch/, hfds/)"
            )
        return name

    @field_validator("scale", "ratio", "color_jitter", "aa", "reprob", "crop_pct", "interpolation", "shift")
    @classmethod
    def _has_an_effect(cls, value: Any, info: ValidationInfo) -> Any:
        """A key that this kind of set would ignore is a mistake."""
        name = info.data.get("name")
        given = value != cls.model_fields[str(info.field_name)].default
        if name is not None and given and _in_memory(name) != (info.field_name == "shift"):
            alternative = "shift and hflip" if _in_memory(name) else "scale and ratio"
            raise ValueError(f"has no effect on data.name={name}; there, use {alternative}")
        return value


class Optimisation(Section):
    """One optimizer and its batches."""

    batch_size: int = key(128, "per process", ge=1)
    opt: str = key("sgd", "timm optimizer")
    lr: float = key(0.05, "learning rate", gt=0)
    momentum: float = key(0.9, "of optimizers that have one", ge=0, lt=1)
    weight_decay: float = key(5e-4, "not applied to biases and norms", ge=0)
    clip_grad: float | None = key(None, "largest norm of the gradient; null: not clipped", gt=0)
    grad_accum_steps: int = key(1, "batches per optimizer step", ge=1)
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

    epochs: int = key(10, "0: no training", ge=0)
    validation_batch_size: int | None = key(None, "null: batch_size", ge=1)
    sched: _SCHEDULES = key("cosine", "timm schedule of the learning rate")
    sched_on_updates: bool = key(True, "the schedule moves at every step, not only at every epoch")
    warmup_epochs: int = key(0, "of linear warm-up", ge=0)
    warmup_lr: float = key(1e-5, "at which the warm-up begins", ge=0)
    min_lr: float = key(0.0, "at which the schedule ends", ge=0)
    cooldown_epochs: int = key(0, "at min_lr, after the schedule", ge=0)
    decay_epochs: float | None = key(None, "period of sched: step; null: timm's default", gt=0)
    decay_milestones: list[int] = key([], "epochs of sched: multistep", validate_default=True)
    decay_rate: float = key(0.1, "of sched: step and multistep", gt=0)
    smoothing: float = key(0.0, "label smoothing", ge=0, lt=1)
    model_ema: bool = key(False, "keep and report an exponential moving average of the weights")
    model_ema_decay: float = key(0.9998, "of the moving average", gt=0, lt=1)

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
    iterations: int = key(30, "N_t of the paper", ge=1)
    batches: int = key(10, "m of the paper: training batches per iteration", ge=0)
    cooldown_iterations: int = key(3, "after the last moves, train m batches so many times at a falling lr", ge=0)
    expansion: Annotated[float, Field(ge=1, le=16)] | Literal["auto"] = key(
        "auto", "widen every layer by this factor before construction; auto: the least one that the budgets need"
    )
    noise: float = key(1.0, "how unequally copies of a widened unit share its outgoing weights", ge=0, le=1)
    copy_importance: float = key(0.1, "importance of second copies as a share of their own; 1: as any unit", ge=0, le=1)
    init: Literal["original", "random"] = key("original", "weights to start from; original: widened, same function")
    importance: Literal["per-sample", "per-batch", "magnitude", "random"] = key(
        "per-sample", "estimator of Eq. 2 and 3"
    )
    importance_batches: int = key(2, "batches per iteration on which Eq. 2 is evaluated", ge=1)
    alpha: float = key(1.5, "alpha_k = alpha ** (k - 1) of Eq. 3", gt=0)
    beta: float = key(0.9, "suppression of weight updates (III-A2); 1: none", gt=0, le=1)
    threshold: float = key(1e-5, "weights below it are pruned; 0: none", ge=0)
    band: tuple[float, float] | None = key(
        (0.8, 1.25), "least and greatest width of a layer relative to the uniform pattern; null: free"
    )
    increments: tuple[float, float] | None = key(
        (0.5, 1.5), "the same for the units that a level adds; null: free; without a band: no effect"
    )
    rebirth: bool = key(True, "after the last moves, units that never fire get new incoming weights")
    updates: Literal["joint", "sequential"] = key("joint", "one pass for all subnets, or the paper's ascending order")
    reconstruct: int = key(
        0,
        "training pictures on which least squares brings the original's values back, before retraining; 0: none",
        ge=0,
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
    temperature: float = key(1.0, "of the distillation", gt=0)
    subnet_weights: list[float] | None = key(None, "weight of every subnet's loss, smallest subnet first; null: all 1")
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


class Recipe(Section):
    """One run, from the data to the report. Paths are relative to the current folder."""

    model: ModelConfig = key(..., "the network that is to become a SteppingNet")
    data: DataConfig = key(..., "the pictures that it learns from")
    budgets: list[float | int | str] = key(
        [],
        'ascending; numbers up to 1.0 and "40%": shares of the MACs; whole numbers and "300M": MACs',
        validate_default=True,
    )
    train: Train = key(Train(), "training of the original", validate_default=True)
    construction: Construction = key(Construction(), "how the subnets are found")
    retrain: Retrain = key(Retrain(), "training of the subnets")
    output: str | None = key(None, "folder of the results; null: runs/NAME-OF-THE-RECIPE")
    seed: int = key(0, "of weights, order and augmentation", ge=0)
    device: str = key("auto", "auto, cpu, mps, cuda or cuda:NUMBER", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")

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


_BUDGET = re.compile(r"([0-9]*\.?[0-9]+)\s*([kMG%])", re.IGNORECASE)


def _budget_problem(budget: float | int | str) -> str | None:
    """What is wrong with a single budget, or None."""
    if isinstance(budget, str):
        match = _BUDGET.fullmatch(budget.strip())
        if match is None:
            return f"{budget!r} is no budget: write 0.3, 40%, 300M, 1.2G or a whole number of MACs"
        if float(match[1]) == 0 or (match[2] == "%" and float(match[1]) > 100):
            return f"{budget!r} is out of range: a share lies above 0 % and up to 100 %"
    elif isinstance(budget, float) and not 0 < budget <= 1:
        return f"{budget} is out of range: a share lies above 0 and up to 1.0; MACs are whole numbers"
    elif isinstance(budget, int) and budget <= 1:
        return f"{budget} would be a number of MACs: write {float(budget)} for a share of the original"
    return None


def _budget_size(budget: float | int | str) -> tuple[str, float]:
    """("share" of the original or "MACs", amount)."""
    if isinstance(budget, str):
        number, unit = _BUDGET.fullmatch(budget.strip()).groups()  # type: ignore[union-attr]  # checked before
        if unit == "%":
            return "share", float(number) / 100
        return "MACs", float(number) * {"k": 1e3, "m": 1e6, "g": 1e9}[unit.lower()]
    return ("share" if isinstance(budget, float) else "MACs"), float(budget)


def _scalar(text: str) -> float | int | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def _in_memory(name: str) -> bool:
    return name in ("digits", "fashion_mnist") or name.removeprefix("torch/") in (
        *TORCH_SETS,
        "fashion_mnist",
    )


def _closest(name: str, names: list[str], source: str) -> str:
    """`nearest`, without the whole list where it is long and has nothing close."""
    hint = nearest(name, names)
    return hint if hint.startswith("did you mean") else f"{source} lists all"

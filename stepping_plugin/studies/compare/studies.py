"""The variants of every study: a method, and recipe keys that it changes.

A variant is run once per recipe and seed whatever study asks for it: "steppingnet" is the reference of all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...errors import SteppingError, nearest
from ...integrations.torch_pruning.to_budget import PRUNERS
from ...runs.recipe import load_recipe
from ...runs.recipe_schema import Recipe

__all__ = ["METHODS", "REFERENCE", "STUDIES", "Variant", "method_variants", "study_variants"]

REFERENCE = "steppingnet"


@dataclass(frozen=True)
class Variant:
    """One row of a table.

    Attributes:
        name: folder of its results.
        method: a name in `methods.METHODS`.
        overrides: "key.sub=value" pairs on top of the recipe and of what the caller overrides.
        label: for tables and pictures.
        stretch: factor on the epochs of the retraining.
        defaults: pairs on top of the recipe; what the caller overrides comes first.
    """

    name: str
    method: str
    overrides: tuple[str, ...] = ()
    label: str = ""
    stretch: float = 1.0
    defaults: tuple[str, ...] = ()

    def ignores(self, key: str) -> bool:
        """Whether a recipe key has no influence on this variant's numbers."""
        section, _, name = key.partition(".")
        if section != "construction" or self.method == "stepping":
            return key in _FREE
        return name in _STRUCTURE or (name in _OPTIMISER and not self.regularises)

    @property
    def regularises(self) -> bool:
        """Whether it is a pruner of the toolkit that trains towards sparsity, for as long as a construction takes."""
        return self.method == "toolkit" and PRUNERS[self.pruner].sparse

    @property
    def pruner(self) -> str:
        """Of method "toolkit": name in `PRUNERS`."""
        return self.name.removeprefix("tp-")

    def recipe(self, name: str, overrides: Sequence[str] = (), seed: int = 0) -> Recipe:
        """A recipe (path or name) as this variant runs it.

        Raises:
            RecipeError: mistakes in the recipe or the overrides.
        """
        given = [*self.defaults, *overrides, *self.overrides, f"seed={seed}"]
        recipe = load_recipe(name, given)
        if self.stretch == 1:
            return recipe
        epochs = round(self.stretch * recipe.retrain.epochs)
        milestones = [round(self.stretch * m) for m in recipe.retrain.decay_milestones]
        return load_recipe(name, [*given, f"retrain.epochs={epochs}", f"retrain.decay_milestones={milestones}"])


_FREE = ("output", "device", "data.root", "data.download", "data.workers")
_STRUCTURE = frozenset(  # of nested nets; other methods take the number of updates from this section
    [
        "flow",
        "policy",
        "expansion",
        "noise",
        "copy_importance",
        "init",
        "importance",
        "importance_batches",
        "alpha",
        "beta",
        "threshold",
        "band",
        "increments",
        "rebirth",
        "round_to",
        "latency",
        "updates",
        "reconstruct",
    ]
)
_OPTIMISER = frozenset(["opt", "lr", "momentum", "weight_decay", "clip_grad", "amp", "amp_dtype"])
# Spelled out, because a recipe may ask for the paper's construction. The flow is what the variant is; the rest may be
# overridden.
_FLOW = "construction.flow=trajectory"
_OURS = ("construction.importance=per-sample", "construction.band=[0.8,1.25]", "construction.init=original")
# One step of all subnets costs about half as much again as a plain one, those of four separate nets cost four: with so
# many more epochs SteppingNet's training costs as much as theirs.
_LONG = 2.5
_PAPER = ("construction.flow=paper", "construction.importance=per-batch", "construction.band=null")
_REGULAR = "construction.policy=any-width"
_TOOLKIT = {
    "magnitude": "group magnitude",
    "taylor": "group Taylor",
    "bn-scale": "BN scale",
    "group-norm": "group norm, sparse training",
    "growing-reg": "growing regularisation",
    "random": "random",
}


def _ours(name: str, label: str, *keys: str, stretch: float = 1.0) -> Variant:
    return Variant(name, "stepping", (_FLOW, *keys), label, stretch, _OURS)


METHODS: dict[str, Variant] = {
    variant.name: variant
    for variant in [
        _ours(REFERENCE, "SteppingNet (trajectory flow)"),
        _ours("any-width", "any-width", _REGULAR),
        _ours(f"{REFERENCE}-long", "SteppingNet, training cost of separate nets", stretch=_LONG),
        _ours("any-width-long", "any-width, training cost of separate nets", _REGULAR, stretch=_LONG),
        Variant("slimmable", "slimmable", label="slimmable"),
        Variant("tp-magnitude", "toolkit", label="torch-pruning, group magnitude"),
        Variant("steppingnet-paper", "stepping", _PAPER, "SteppingNet (paper flow)"),
        Variant("scratch", "scratch", label="dense nets from scratch"),
        *[Variant(f"tp-{key}", "toolkit", label=f"torch-pruning, {text}") for key, text in _TOOLKIT.items()][1:],
    ]
}

_EXPANSIONS = (1.0, 1.2, 1.5, 1.8, 2.0, 2.5)
_ABLATION = {
    "no-suppression": ("without suppression", ["construction.beta=1", "retrain.beta=1"]),
    "strong-suppression": ("suppression with beta 0.5", ["retrain.beta=0.5"]),
    "no-distillation": ("without distillation", ["retrain.distill_from=none"]),
    "in-place-distillation": ("the largest subnet teaches", ["retrain.distill_from=largest"]),
    "neither": ("without both", ["construction.beta=1", "retrain.beta=1", "retrain.distill_from=none"]),
    "sequential": ("sequential updates", ["construction.updates=sequential", "retrain.updates=sequential"]),
    "equal-shares": ("copies with equal shares", ["construction.noise=0"]),
    "copies-alike": ("copies ranked like any unit", ["construction.copy_importance=1"]),
    "random-importance": ("units ranked at random", ["construction.importance=random"]),
    "uniform-widths": ("widths nearly uniform", ["construction.band=[0.97,1.03]"]),
    "reconstruction": ("the original reconstructed on 1,000 pictures", ["construction.reconstruct=1000"]),
    "no-rebirth": ("dead units stay dead", ["construction.rebirth=false"]),
    "free-increments": ("increments of widths free", ["construction.increments=null"]),
    "free-widths": ("widths free", ["construction.band=null"]),
    "long-construction": ("10 batches per iteration in construction, on top", ["construction.batches=10"]),
}

_ROUNDINGS = (4, 8, 16)

STUDIES: dict[str, list[Variant]] = {
    "methods": list(METHODS.values()),
    "expansion": [
        METHODS[REFERENCE],
        *[_ours(f"expansion-{f:g}", f"expansion {f:g}", f"construction.expansion={f}") for f in _EXPANSIONS],
    ],
    "ablation": [
        METHODS[REFERENCE],
        *[_ours(name, label, *keys) for name, (label, keys) in _ABLATION.items()],
    ],
    "rounding": [
        METHODS[REFERENCE],
        *[_ours(f"round-{r}", f"levels in multiples of {r}", f"construction.round_to={r}") for r in _ROUNDINGS],
    ],
}


def study_variants(study: str) -> list[Variant]:
    """Variants of a study.

    Raises:
        SteppingError: unknown study.
    """
    if study not in STUDIES:
        raise SteppingError(f"--study: got {study!r}; {nearest(study, STUDIES)}")
    return STUDIES[study]


def method_variants(names: Sequence[str]) -> list[Variant]:
    """Variants by name, in the given order.

    Raises:
        SteppingError: unknown name.
    """
    known = {variant.name: variant for variants in STUDIES.values() for variant in variants}
    for name in names:
        if name not in known:
            raise SteppingError(f"--methods: got {name!r}; {nearest(name, known)}")
    return [known[name] for name in names]

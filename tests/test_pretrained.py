"""Weights of other classes and channels: what is taken over is taken over exactly, what is not is said."""

import json

import pytest
import timm
import torch
from safetensors.torch import save_file

from stepping_plugin.errors import CheckpointError, SteppingError
from stepping_plugin.integrations.timm.twins import GROUPS, twins_of
from stepping_plugin.runs.pipeline import Run
from stepping_plugin.runs.pretrained import HEAD, fit_to_model, head_names, new_head, start_from
from stepping_plugin.runs.recipe import load_recipe

# Heads: linear, inside of a module, behind a norm, two of them.
FAMILIES = ["resnet10t", "mobilenetv3_small_050", "vit_tiny_patch16_224", "convnext_atto", "levit_128s", "lenet5"]
SIZES = {"lenet5": 32, "resnet10t": 64, "mobilenetv3_small_050": 64, "convnext_atto": 64}


def made(name, classes, channels=3, **keys):
    torch.manual_seed(classes)
    return timm.create_model(name, num_classes=classes, in_chans=channels, **keys).eval()


def features(model, name, images):
    with torch.no_grad():
        return model.forward_features(images)


@pytest.mark.parametrize("name", FAMILIES)
def test_another_number_of_classes_replaces_the_head_and_nothing_else(name, tmp_path):
    source, target = made(name, 7), made(name, 3)
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    notes = start_from(target, tmp_path / "w.safetensors", name)
    heads = _listed(target.get_classifier())
    inner = [target.get_submodule(head) for head in head_names(target)]
    assert len(inner) == len(heads) and all(layer in outer.modules() for layer, outer in zip(inner, heads))
    inside = tuple(f"{head}." for head in head_names(target))
    for key, tensor in target.state_dict().items():
        assert key.startswith(inside) or torch.equal(tensor, source.state_dict()[key]), key
    size = SIZES.get(name, 224)
    images = torch.randn(1, 3, size, size)
    assert torch.equal(features(target, name, images), features(source, name, images))
    said = [note for note in notes if HEAD in note]
    assert len(said) == len(heads) and all("(7, " in note and "(3, " in note for note in said)
    for head in head_names(target):
        layer = target.get_submodule(head)
        bound = layer.weight[0].numel() ** -0.5
        assert 0.8 * bound < layer.weight.abs().max() <= bound and not layer.bias.any()


def _listed(modules):
    return list(modules) if isinstance(modules, (tuple, list)) else [modules]


@pytest.mark.parametrize(
    "name", ["resnet10t", "vit_tiny_patch16_224", "tf_efficientnet_lite0", "convnext_atto", "lenet5"]
)
def test_one_channel_sees_grey_as_three_channels_did(name, tmp_path):
    source, target = made(name, 5).double(), made(name, 5, 1).double()
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    (note,) = [note for note in start_from(target, tmp_path / "w.safetensors", name) if "channels" in note]
    assert "from 3 to 1 channels" in note
    grey = torch.rand(1, 1, *[SIZES.get(name, 224)] * 2, dtype=torch.float64)
    with torch.no_grad():
        expected = source(grey.expand(-1, 3, -1, -1))
        torch.testing.assert_close(target(grey), expected, atol=1e-5, rtol=1e-5)  # timm sums in float32


def test_more_channels_repeat_the_colours_at_the_same_scale(tmp_path):
    source, target = made("resnet10t", 5), made("resnet10t", 2, 6)
    tensors, notes = fit_to_model(target, source.state_dict())
    first, own = source.state_dict()["conv1.0.weight"], tensors["conv1.0.weight"]
    assert torch.equal(own, torch.cat([first, first], 1) / 2) and len(notes) == 2
    back, _ = fit_to_model(made("resnet10t", 5, 1), made("resnet10t", 5, 4).state_dict())
    assert back["conv1.0.weight"].shape[1] == 1


def test_position_embeddings_of_another_image_size_are_resized_by_timm(tmp_path):
    source, target = (made("vit_tiny_patch16_224", 5, img_size=size) for size in (64, 96))
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    notes = start_from(target, tmp_path / "w.safetensors", "vit_tiny_patch16_224")
    assert any("timm's filter" in note for note in notes)
    assert torch.equal(target.blocks[0].attn.qkv.weight, source.blocks[0].attn.qkv.weight)


def test_a_file_without_a_head_gets_one_and_other_architectures_are_refused(tmp_path):
    source, target = made("resnet10t", 0), made("resnet10t", 3)
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    assert any("missing -> (3, 512)" in note for note in start_from(target, tmp_path / "w.safetensors", "resnet10t"))
    other = made("mobilenetv3_small_050", 3)
    before = {k: v.clone() for k, v in other.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"not the weights of MobileNetV3.*stepping convert-weights FILE --model"):
        start_from(other, tmp_path / "w.safetensors", "mobilenetv3_small_050")
    assert all(torch.equal(v, before[k]) for k, v in other.state_dict().items())


def test_new_heads_draw_from_the_seed():
    model = made("resnet10t", 3)
    torch.manual_seed(0)
    first = new_head(model)
    torch.manual_seed(0)
    assert torch.equal(new_head(model)["fc.weight"], first["fc.weight"])
    assert not torch.equal(new_head(model)["fc.weight"], first["fc.weight"])


# --- Twins


def test_twins_have_the_same_tensors_and_are_built_differently():
    ((twin, text),) = [found for found in twins_of("efficientnet_lite0") if found[0].startswith("tf_")]
    assert twin == "tf_efficientnet_lite0" and "Conv2dSame for Conv2d" in text and "eps=0.001 for eps=1e-05" in text
    assert twins_of("convnext_atto") == []
    assert len({name for group in GROUPS for variant in group for name in variant.split()}) > 100
    for group in (g for g in GROUPS if any(name in g[0] for name in ("lite0", "nest_tiny", "mixnet_s"))):
        with torch.device("meta"):
            models = [timm.create_model(variant.split()[0], num_classes=10) for variant in group]
        shapes = [[(k, v.shape) for k, v in model.state_dict().items()] for model in models]
        assert all(shape == shapes[0] for shape in shapes) and len({repr(model) for model in models}) == len(models)


@pytest.mark.slow
def test_the_table_of_twins_is_that_of_timms_registry():
    """Every model of timm without its weights; those of other releases than the table's are left out."""
    known = {name for group in GROUPS for variant in group for name in variant.split()}
    found: dict[int, dict[str, list[str]]] = {}
    for name in timm.list_models():
        with torch.device("meta"):
            model = timm.create_model(name, num_classes=10)
        shapes = hash(tuple(sorted((k, tuple(v.shape)) for k, v in model.state_dict().items())))
        found.setdefault(shapes, {}).setdefault(repr(model), []).append(name)
    groups = {tuple(sorted(" ".join(sorted(names)) for names in group.values()))
              for group in found.values() if len(group) > 1}  # fmt: skip
    assert {group for group in groups if any(name in known for variant in group for name in variant.split())} == set(
        GROUPS
    )


def test_a_file_that_fits_two_architectures_is_told_unless_it_says_which(tmp_path):
    name, path = "efficientnet_lite0", tmp_path / "w.safetensors"
    state = made(name, 2).state_dict()
    save_file(state, path)
    (note,) = start_from(made(name, 2), path, name)
    assert "the same tensors fit tf_efficientnet_lite0 (Conv2dSame for Conv2d" in note
    save_file(state, path, {"pretrained_cfg": json.dumps({"architecture": name})})
    assert start_from(made(name, 2), path, name) == []
    save_file(state, path)
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "tf_efficientnet_lite0"}))
    (note,) = start_from(made(name, 2), path, name)
    assert note.startswith("warning: its description says tf_efficientnet_lite0, the recipe efficientnet_lite0")


# --- In a run


def test_a_run_says_what_it_adapted_once_and_refuses_an_untrained_head(tmp_path):
    path, said = tmp_path / "w.safetensors", []
    save_file(made("digits_net", 7, 3).state_dict(), path)
    run = Run(load_recipe("digits", [f"model.checkpoint_path={path}"]), tmp_path, said.append)
    for _ in range(2):
        run.build_model(run.recipe.model, pretrained=False)
    assert len([text for text in said if HEAD in text]) == 1 and any("3 to 1 channels" in text for text in said)
    untrained = load_recipe("digits", [f"model.checkpoint_path={path}", "train.epochs=0"])
    with pytest.raises(SteppingError, match=r"model: its classifier is new and would not be trained.*train\.epochs"):
        Run(untrained, tmp_path, said.append).build_model(untrained.model, pretrained=False)
    teacher = {"name": "digits_net", "checkpoint_path": str(path)}
    taught = load_recipe("digits", ["retrain.distill_from=teacher", f"retrain.teacher={json.dumps(teacher)}"])
    with pytest.raises(SteppingError, match=r"retrain\.teacher: its classifier is new"):
        Run(taught, tmp_path, said.append).build_model(taught.retrain.teacher, pretrained=False)

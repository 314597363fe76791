"""Models by name: the smallest variant of every model module of timm, and of every family of torchvision."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["CLASSES", "FAMILIES", "TORCHVISION", "Spec", "spec_of"]

CLASSES = 10  # of every model in a coverage run: the classifier is not what is being examined


@dataclass(frozen=True)
class Spec:
    """One model to check.

    Attributes:
        model: timm name, or `torchvision:NAME`.
        module: timm module that defines it.
        image: height and width of the images; None: the smallest that the model runs on, see `variants.fitted`.
        kwargs: for `timm.create_model`.
    """

    model: str
    module: str
    image: int | None
    kwargs: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def reduced(self) -> dict[str, Any]:
        """Keyword arguments that make the model smaller than its name says (the size of images left out)."""
        return {k: v for k, v in self.kwargs.items() if k != "img_size"}


# The smallest variant of every module, at the smallest images that it runs on from 64 pixels up. Models of more than
# 60 million parameters in a reduced form; all operators of the original are still there.
FAMILIES: tuple[Spec, ...] = (
    Spec("beit_base_patch16_224", "beit", 64, {"embed_dim": 192, "depth": 3, "num_heads": 3, "img_size": 64}),
    Spec("halonet_h1", "byoanet", 256),
    Spec("test_byobnet", "byobnet", 64),
    Spec("cait_xxs24_224", "cait", 64, {"img_size": 64}),
    Spec("coat_tiny", "coat", 64, {"img_size": 64}),
    Spec("convit_tiny", "convit", 64, {"img_size": 64}),
    Spec("convmixer_768_32", "convmixer", 64),
    Spec("test_convnext", "convnext", 64),
    Spec("cpubone_nano", "cpubone", 64),
    Spec("crossvit_tiny_240", "crossvit", 64),
    Spec("csatv2", "csatv2", 64),
    Spec("cs3darknet_focus_s", "cspnet", 64),
    Spec("cspnext_tiny", "cspnext", 64),
    Spec("davit_tiny", "davit", 64),
    Spec("deepseek_vit_412m", "deepseek_vit", 112, {"embed_dim": 192, "depth": 3, "num_heads": 3}),
    Spec("deit_tiny_patch16_224", "deit", 64, {"img_size": 64}),
    Spec("densenet121", "densenet", 64),
    Spec("dla46x_c", "dla", 64),
    Spec("dpn48b", "dpn", 64),
    Spec("edgenext_xx_small", "edgenext", 64),
    Spec("efficientformer_l1", "efficientformer", 224),
    Spec("efficientformerv2_s0", "efficientformer_v2", 64, {"img_size": 64}),
    Spec("test_efficientnet", "efficientnet", 64),
    Spec("efficientvim_m1", "efficientvim", 64),
    Spec("efficientvit_b0", "efficientvit_mit", 64),
    Spec("efficientvit_m0", "efficientvit_msra", 64),
    Spec("vit_tiny_patch16_dinov3_qkvb", "eva", 64),
    Spec("fasternet_t0", "fasternet", 64),
    Spec("fastvit_t8", "fastvit", 64),
    Spec("focalnet_tiny_srf", "focalnet", 64),
    Spec("gcvit_xxtiny", "gcvit", 64, {"img_size": 64}),
    Spec("gemma4_vit_167m", "gemma4_vit", 64, {"embed_dim": 192, "depth": 3, "num_heads": 3}),
    Spec("ghostnet_050", "ghostnet", 64),
    Spec("hardcorenas_b", "hardcorenas", 64),
    Spec("hgnetv2_b0", "hgnet", 64),
    Spec("hiera_tiny_224", "hiera", 64, {"img_size": 64}),
    Spec("sam2_hiera_tiny", "hieradet_sam2", 64),
    Spec("hrnet_w18_small", "hrnet", 64),
    Spec("iformer_t", "iformer", 64),
    Spec("inception_next_atto", "inception_next", 64),
    Spec("ens_adv_inception_resnet_v2", "inception_resnet_v2", 96),
    Spec("adv_inception_v3", "inception_v3", 96),
    Spec("inception_v4", "inception_v4", 96),
    Spec("lcnetv2_small", "lcnetv2", 64),
    Spec("levit_128s", "levit", 64, {"img_size": 64}),
    Spec("lowformer_b0", "lowformer", 64),
    Spec("test_mambaout", "mambaout", 64),
    Spec("test_coatnet", "maxxvit", 64, {"img_size": 64}),
    Spec("poolformerv2_s12", "metaformer", 64),
    Spec("gmlp_ti16_224", "mlp_mixer", 64, {"img_size": 64}),
    Spec("mobilenetv3_small_050", "mobilenetv3", 64),
    Spec("mobilenetv5_base", "mobilenetv5", 64, {"channel_multiplier": 0.5}),
    Spec("mobilevit_xxs", "mobilevit", 64),
    Spec("mvitv2_tiny", "mvitv2", 64),
    Spec("naflexvit_base_patch16_gap", "naflexvit", 64, {"embed_dim": 192, "depth": 3, "num_heads": 3}),
    Spec("nasnetalarge", "nasnet", 64, {"num_features": 2016, "stem_size": 96}),
    Spec("jx_nest_tiny", "nest", 64, {"img_size": 64}),
    Spec("nextvit_small", "nextvit", 64),
    Spec("test_nfnet", "nfnet", 64),
    Spec("pit_ti_224", "pit", 64, {"img_size": 64}),
    Spec("pnasnet5large", "pnasnet", 64),
    Spec("pvt_v2_b0", "pvt_v2", 64),
    Spec("qwen3_vit_88m", "qwen3_vit", 64, {"embed_dim": 192, "depth": 3, "num_heads": 3}),
    Spec("rdnet_tiny", "rdnet", 64),
    Spec("regnetx_002", "regnet", 64),
    Spec("repghostnet_050", "repghost", 64),
    Spec("repvit_m1", "repvit", 64),
    Spec("res2next50", "res2net", 64),
    Spec("resnest14d", "resnest", 64),
    Spec("test_resnet", "resnet", 64),
    Spec("resnetv2_18", "resnetv2", 64),
    Spec("rexnet_100", "rexnet", 64),
    Spec("selecsls42", "selecsls", 64),
    Spec("legacy_seresnet18", "senet", 64),
    Spec("sequencer2d_s", "sequencer", 64),
    Spec("shvit_s1", "shvit", 64),
    Spec("skresnet18", "sknet", 64),
    Spec("starnet_s050", "starnet", 64),
    Spec("swiftformer_xs", "swiftformer", 64),
    Spec("swin_tiny_patch4_window7_224", "swin_transformer", 64, {"img_size": 64}),
    Spec("swinv2_tiny_window16_256", "swin_transformer_v2", 64, {"img_size": 64}),
    Spec("swinv2_cr_tiny_224", "swin_transformer_v2_cr", 64, {"img_size": 64}),
    Spec("tiny_vit_5m_224", "tiny_vit", 64),
    Spec("tnt_s_legacy_patch16_224", "tnt", 64, {"img_size": 64}),
    Spec("tresnet_m", "tresnet", 64),
    Spec("twins_svt_small", "twins", 64),
    Spec("vgg11", "vgg", 64, {"mlp_ratio": 0.25}),
    Spec("visformer_tiny", "visformer", 64, {"img_size": 64}),
    Spec("test_vit", "vision_transformer", 64),
    Spec("vit_tiny_r_s16_p8_224", "vision_transformer_hybrid", 64, {"img_size": 64}),
    Spec("test_vit_relpos", "vision_transformer_relpos", 64, {"img_size": 64}),
    Spec(
        "samvit_base_patch16_224",
        "vision_transformer_sam",
        64,
        {"embed_dim": 192, "depth": 3, "num_heads": 3, "global_attn_indexes": [2]},
    ),
    Spec("vitamin_small_224", "vitamin", 64, {"img_size": 64}),
    Spec("volo_d1_224", "volo", 64, {"img_size": 64}),
    Spec("ese_vovnet19b_slim_dw", "vovnet", 64),
    Spec("legacy_xception", "xception", 64),
    Spec("xception41p", "xception_aligned", 64),
    Spec("xcit_nano_12_p8_224", "xcit", 64),
)

# The smallest classifier of every family of torchvision.
TORCHVISION: tuple[Spec, ...] = tuple(
    Spec(f"torchvision:{model}", f"torchvision.{module}", image, kwargs)
    for module, model, image, kwargs in (
        ("alexnet", "alexnet", 64, {}),
        ("convnext", "convnext_tiny", 64, {}),
        ("densenet", "densenet121", 64, {}),
        ("efficientnet", "efficientnet_b0", 64, {}),
        ("googlenet", "googlenet", 64, {"aux_logits": False, "init_weights": False}),
        ("inception", "inception_v3", 96, {"aux_logits": False, "init_weights": False}),
        ("maxvit", "maxvit_t", 224, {}),
        ("mnasnet", "mnasnet0_5", 64, {}),
        ("mobilenetv2", "mobilenet_v2", 64, {}),
        ("mobilenetv3", "mobilenet_v3_small", 64, {}),
        ("regnet", "regnet_y_400mf", 64, {}),
        ("resnet", "resnet18", 64, {}),
        ("shufflenetv2", "shufflenet_v2_x0_5", 64, {}),
        ("squeezenet", "squeezenet1_1", 64, {}),
        ("swin_transformer", "swin_t", 64, {}),
        ("vgg", "vgg11", 64, {}),
        ("vision_transformer", "vit_b_16", 64, {"image_size": 64}),
    )
)


def spec_of(name: str) -> Spec:
    """A timm model at its own image size."""
    import timm
    from timm.models import _registry

    config = timm.get_pretrained_cfg(name)
    image = config.input_size[-1] if config else 224
    return Spec(name, _registry._model_to_module[name], image)

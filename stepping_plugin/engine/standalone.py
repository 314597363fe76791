"""A net exported as ONNX, with onnxruntime, numpy and Pillow alone: no torch, and nothing of the package that made it.

This file is copied into every ONNX export as `run.py`; `engine.preprocess` uses the same `prepare`.

    python run.py picture.jpg ...                       every answer, with class, confidence, subnet and MACs
    net = Net("folder"); net.predict("picture.jpg")     the same in Python
"""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["Net", "prepare"]


# ------------------------------------------------------------------------------------------------- pictures


def prepare(picture: Any, how: dict[str, Any]) -> Any:
    """The net's input, float32 array (C, H, W), from a PIL image, as `preprocessing` of a manifest says.

    Bit by bit what torchvision's and timm's transforms of PIL images give; where sets in memory are resized by torch,
    to its last bits.
    """
    pixels = _cropped(_resized(_converted(picture, how["mode"]), how), how)
    array = np.asarray(pixels)
    array = array[:, :, None] if array.ndim == 2 else array
    values = array.transpose(2, 0, 1).astype(np.float32) / np.float32(255)
    mean, std = (np.asarray(how[key], np.float32)[:, None, None] for key in ("mean", "std"))
    return np.ascontiguousarray((values - mean) / std)


def _converted(picture: Any, mode: str) -> Any:
    """A picture of mode L or RGB. Pages of a file that has three are channels; 16 bits become the upper 8."""
    from PIL import Image, ImageSequence

    pages = mode == "RGB" and getattr(picture, "n_frames", 1) == 3
    if not pages and not picture.mode.startswith(("I", "F")):
        return picture.convert(mode)
    array = np.asarray(picture)
    if pages:
        array = np.stack([np.asarray(page) for page in ImageSequence.Iterator(picture)], -1)
    if array.dtype.kind == "f" or (array.size and not 0 <= array.min() <= array.max() < 2**16):
        raise ValueError(f"numbers of {array.dtype}: pictures have 8 or 16 bits per channel")
    if array.dtype == bool:
        array = array.astype(np.uint8) * np.uint8(255)
    if array.dtype != np.uint8:
        array = (array >> 8).astype(np.uint8)
    return Image.fromarray(array).convert(mode)


def _resized(picture: Any, how: dict[str, Any]) -> Any:
    from PIL import Image

    kind, wanted = how["resize"], how["size"]
    if kind == "none":
        return picture
    width, height = picture.size
    if kind == "exact":
        size = wanted
    elif kind == "shorter":  # torchvision's Resize(int)
        short, long = min(width, height), max(width, height)
        new = wanted[0], int(wanted[0] * long / short)
        size = new if width > height else (new[1], new[0])
    else:  # timm's ResizeKeepRatio
        ratios = height / wanted[0], width / wanted[1]
        ratio = min(ratios) if kind == "cover" else max(ratios)
        size = [round(height / ratio), round(width / ratio)]
    if tuple(size) == (height, width):
        return picture
    if how["library"] == "torch":
        return Image.fromarray(_resized_as_torch(np.asarray(picture), size))
    return picture.resize((size[1], size[0]), getattr(Image.Resampling, how["interpolation"].upper()))


def _resized_as_torch(pixels: Any, size: Any) -> Any:
    """`torch.nn.functional.interpolate(..., mode="bilinear", antialias=True)` of floats, rounded to bytes."""
    values = pixels.astype(np.float32)
    for axis in (1, 0):  # rows first, as torch does
        weights = _triangles(values.shape[axis], size[axis])
        values = np.moveaxis(np.tensordot(weights, values, (1, axis)), 0, axis)
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def _triangles(old: int, new: int) -> Any:
    """Weights (new, old) of a triangular filter that is as wide as a new pixel, at least as an old one."""
    scale = old / new
    support = max(scale, 1.0)
    centres = (np.arange(new)[:, None] + 0.5) * scale
    weights = np.maximum(0, 1 - np.abs(np.arange(old)[None] + 0.5 - centres) / support)
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


def _cropped(picture: Any, how: dict[str, Any]) -> Any:
    """The middle, as torchvision's CenterCrop, padded where the picture is smaller."""
    from PIL import Image

    if how["crop"] is None:
        return picture
    height, width = how["crop"]
    missing_x, missing_y = max(width - picture.width, 0), max(height - picture.height, 0)
    if missing_x or missing_y:
        fill = tuple(how["fill"]) * (len(how["mode"]) if len(how["fill"]) == 1 else 1)
        size = picture.width + missing_x, picture.height + missing_y
        larger = Image.new(how["mode"], size, fill if len(fill) > 1 else fill[0])
        larger.paste(picture, (missing_x // 2, missing_y // 2))
        picture = larger
    left, top = round((picture.width - width) / 2), round((picture.height - height) / 2)
    return picture.crop((left, top, left + width, top + height))


# ------------------------------------------------------------------------------------------------- the net


class Net:
    """The steps of an exported net.

    Args:
        folder: of the export.
        session: makes a session from the path of a step; by default onnxruntime's on the CPU.
    """

    def __init__(self, folder: Any = ".", session: Any = None) -> None:
        self.folder = Path(folder)
        self.manifest = json.loads((self.folder / "manifest.json").read_text(encoding="utf-8"))
        self.steps = self.manifest["steps"]
        self.exit = self.manifest.get("exit")
        self.classes = self.manifest.get("classes")
        self._make = session or _on_cpu
        self._sessions: dict[int, Any] = {}

    def prepare(self, picture: Any) -> Any:
        """The net's input, (1, C, H, W), from a PIL image or the path of one."""
        from PIL import Image

        how = self.manifest.get("preprocessing")
        if how is None:
            raise ValueError("the manifest does not say how pictures are prepared: pass an array (1, C, H, W)")
        if isinstance(picture, (str, Path)):
            with Image.open(picture) as opened:
                return prepare(opened, how)[None].astype(self.manifest["dtype"])
        return prepare(picture, how)[None].astype(self.manifest["dtype"])

    def scores(self, images: Any) -> Any:
        """Class scores (B, classes) of subnets 1..N, each computed when it is asked for."""
        caches = {"image": images}
        for k, step in enumerate(self.steps):
            if k not in self._sessions:
                self._sessions[k] = self._make(self.folder / step["file"])
            given = {entry["name"]: caches[entry["cache"]] for entry in step["inputs"]}
            results = self._sessions[k].run([entry["name"] for entry in step["outputs"]], given)
            caches.update({entry["cache"]: result for entry, result in zip(step["outputs"], results)})
            for name in step["drop"]:
                del caches[name]
            yield caches["scores"]

    def predict(self, picture: Any, until: Any = "calibrated") -> dict[str, Any]:
        """The answer to one picture.

        Args:
            picture: path, PIL image, or prepared array (1, C, H, W).
            until: "calibrated": stop where the manifest's thresholds say so (without any: at the last subnet); a
                number: at a probability of at least this; None: at the last subnet.

        Returns:
            class (its number), label (its name), confidence, subnet, macs.
        """
        images = picture if isinstance(picture, np.ndarray) else self.prepare(picture)
        rule = self.exit if until == "calibrated" else None
        seen: list[Any] = []
        for subnet, scores in enumerate(self.scores(images), start=1):
            seen.append(scores[0].astype(np.float64))
            shares = _softmax(_answer(seen, rule))
            best = int(shares.argmax())
            if subnet == len(self.steps) or shares[best] >= self._threshold(rule, until, subnet, best):
                break
        label = self.classes[best] if self.classes else str(best)
        macs = self.manifest["macs"][subnet - 1]
        return {"class": best, "label": label, "confidence": float(shares[best]), "subnet": subnet, "macs": macs}

    def _threshold(self, rule: Any, until: Any, subnet: int, best: int) -> float:
        if rule is None:
            return until if isinstance(until, (int, float)) else math.inf
        row = rule["thresholds"][subnet - 1]
        value = row[0] if len(row) == 1 else row[best]
        return math.inf if value is None else value


def _answer(seen: list[Any], rule: Any) -> Any:
    """Scores of the subnets so far, made one answer."""
    if rule is None:
        return seen[-1]
    answer = seen[-1]
    if rule["combine"] == "product":
        weights = np.arange(1, len(seen) + 1)
        answer = sum(w * np.log(np.maximum(_softmax(z), 1e-300)) for w, z in zip(weights, seen)) / weights.sum()
    return answer / rule["temperatures"][len(seen) - 1]


def _softmax(scores: Any) -> Any:
    powers = np.exp(scores - scores.max())
    return powers / powers.sum()


def _on_cpu(path: Path) -> Any:
    import onnxruntime

    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def _rule(text: str) -> Any:
    return {"calibrated": "calibrated", "last": None}[text] if text in ("calibrated", "last") else float(text)


def main() -> int:
    parser = argparse.ArgumentParser(description="Answers of an exported net.")
    parser.add_argument("pictures", nargs="+", help="files that Pillow opens")
    text = "when to stop: calibrated, last, or at a probability (calibrated)"
    parser.add_argument("--until", type=_rule, default="calibrated", metavar="RULE", help=text)
    arguments = parser.parse_args()
    net = Net(Path(__file__).parent)
    for picture in arguments.pictures:
        answer = net.predict(picture, arguments.until)
        shown = "{label}\t{confidence:.4f}\tsubnet {subnet}\t{macs} MACs".format(**answer)
        print(f"{picture}\t{shown}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

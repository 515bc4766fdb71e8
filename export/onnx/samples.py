"""Inputs of a model from a user's files: folders of images, .npy, .npz or raw bytes, with labels.

They calibrate a quantized model and measure it: each sample is made when it is asked for, so that
a folder of any size needs the memory of one batch.
"""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ...runtime.base.errors import ModelFileError, OptionError

if TYPE_CHECKING:
    import onnxruntime

Array = npt.NDArray[Any]

LABEL_KEY = "labels"  # key of an .npz file
BY_FOLDER = "folders"  # instead of a CSV file: the label is the index of an image's folder

_IMAGES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".webp", ".gif", ".tif", ".tiff"})
_RAW: dict[str, np.dtype[Any]] = {
    "int8": np.dtype("i1"),
    "uint8": np.dtype("u1"),
    "float32": np.dtype("<f4"),
}
_DTYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8,
    "tensor(bool)": np.bool_,
}


@dataclass(frozen=True)
class Preprocessing:
    """How an image or raw bytes become an input: (value - mean) * scale, pixels 0 to 255.

    size: (height, width); None takes the model's. layout: "nhwc", "nchw"; None: the one in which
    the model has 1 or 3 channels. mean, scale: one value, or one for each channel. crop: the
    middle of the image, scaled by its shorter side; else the whole image is stretched. bgr: blue
    first.
    raw: the type of the values of .bin files, "int8", "uint8" or "float32".
    """

    size: tuple[int, int] | None = None
    layout: str | None = None
    mean: tuple[float, ...] = (0.0,)
    scale: tuple[float, ...] = (1.0,)
    crop: bool = False
    bgr: bool = False
    raw: str = "int8"

    def __post_init__(self) -> None:
        if self.raw not in _RAW:
            raise OptionError(f"raw: expected {', '.join(_RAW)}, found {self.raw}")
        if self.layout not in (None, "nhwc", "nchw"):
            raise OptionError(f"layout: expected nhwc or nchw, found {self.layout}")
        for name, values in (("mean", self.mean), ("scale", self.scale)):
            if len(values) not in (1, 3) or not all(np.isfinite(values)):
                raise OptionError(f"{name}: expected one value or three, found {list(values)}")
        if self.size is not None and not all(1 <= n <= 16384 for n in self.size):
            raise OptionError(f"size: expected 1x1 to 16384x16384, found {self.size}")


@dataclass(frozen=True)
class InputSpec:
    """An input of the model. shape: None if a dimension is free; the batch comes first."""

    name: str
    shape: tuple[int | None, ...]
    dtype: type[Any]


def input_specs(session: onnxruntime.InferenceSession) -> list[InputSpec]:
    """The inputs of a loaded model. Raises ModelFileError if a type is none of numbers."""
    specs = []
    for i in session.get_inputs():
        if i.type not in _DTYPES:
            raise ModelFileError(f"input {i.name}: expected numbers, found {i.type}")
        shape = tuple(n if isinstance(n, int) else None for n in i.shape)
        specs.append(InputSpec(i.name, shape, _DTYPES[i.type]))
    return specs


def batch_size(specs: Sequence[InputSpec], most: int) -> int:
    """1 if the model's batch is fixed to it, else `most`."""
    fixed = [s.shape[0] for s in specs if s.shape and s.shape[0] is not None]
    return 1 if fixed else most


class Samples:
    """The samples of a folder or file, in a fixed order; labels[i] is the class of the i-th."""

    def __init__(
        self,
        path: Path,
        inputs: Sequence[InputSpec],
        *,
        preprocessing: Preprocessing | None = None,
        labels: Path | str | None = None,
        limit: int | None = None,
    ) -> None:
        """path: a folder of images, .npy, .npz or .bin files (one sample each; .bin: its values in
        the order of the input, and nothing else), or one .npy or .npz file whose first axis counts
        samples; the keys of an .npz are the model's inputs, and may hold `labels`.
        labels: a CSV file, its last column the class; or "folders".
        limit: at most so many samples, evenly over all.

        Raises OptionError if there is nothing to read or labels do not match.
        """
        self._path, self._inputs = path, list(inputs)
        self._preprocessing = preprocessing or Preprocessing()
        self._files: list[Path] = []
        self._arrays: dict[str, Array] = {}
        found: Array | None = None
        if path.is_dir():
            self._files = _files_in(path)
            count = len(self._files)
        elif path.suffix in (".npy", ".npz") and path.is_file():
            self._arrays, found = self._read_arrays(path)
            count = len(next(iter(self._arrays.values())))
        else:
            raise OptionError(f"{path}: expected a folder, or a .npy or .npz file")
        if not count:
            raise OptionError(f"{path}: expected images, .npy, .npz or .bin files, found none")
        if labels is not None:
            found = self._read_labels(labels, count)
        if found is not None and len(found) != count:
            raise OptionError(f"{path}: expected {count} labels, found {len(found)}")
        n = count if limit is None else min(limit, count)
        self._order = [i * count // n for i in range(n)]
        self.labels: Array | None = None if found is None else found[self._order]

    def __len__(self) -> int:
        return len(self._order)

    def batches(self, size: int) -> Iterator[dict[str, Array]]:
        """Inputs by name, [batch, ...], of up to `size` samples that are of one shape."""
        held: list[dict[str, Array]] = []
        for i in self._order:
            sample = self._sample(i)
            alike = not held or all(held[0][k].shape == v.shape for k, v in sample.items())
            if held and (len(held) == size or not alike):
                yield _stacked(held)
                held = []
            held.append(sample)
        if held:
            yield _stacked(held)

    def _sample(self, i: int) -> dict[str, Array]:
        if self._arrays:
            return {k: self._checked(k, v[i : i + 1], self._path) for k, v in self._arrays.items()}
        file = self._files[i]
        if file.suffix == ".npz":
            arrays, _ = self._read_arrays(file, whole=False)
        elif file.suffix == ".npy":
            arrays = {self._only_input(file).name: _load(file)}
        elif file.suffix == ".bin":
            spec = self._only_input(file)
            arrays = {spec.name: self._raw(file, spec)}
        else:
            spec = self._only_input(file)
            arrays = {spec.name: self._image(file, spec)}
        return {k: self._checked(k, v, file) for k, v in arrays.items()}

    def _checked(self, name: str, data: Array, file: Path) -> Array:
        """The sample in the type and shape [1, ...] of the input."""
        spec = next(s for s in self._inputs if s.name == name)
        if data.ndim == len(spec.shape) - 1:
            data = data[None]
        pairs = list(zip(data.shape, spec.shape, strict=False))
        fits = all(want is None or have == want for have, want in pairs[1:])
        if data.ndim != len(spec.shape) or not fits or data.shape[:1] not in ((), (1,)):
            want = [1, *("any" if n is None else n for n in spec.shape[1:])]
            raise OptionError(
                f"{file}: input {name}: expected one sample of shape {want}, found"
                f" {list(data.shape)}"
            )
        if data.dtype.kind not in "biuf" or (data.dtype.kind == "f" and spec.dtype in _INTEGERS):
            raise OptionError(
                f"{file}: input {name}: expected {np.dtype(spec.dtype)}, found {data.dtype}"
            )
        if data.dtype.kind == "f" and not np.isfinite(data).all():
            raise OptionError(
                f"{file}: input {name}: expected finite values, found NaN or infinity"
            )
        return np.ascontiguousarray(data, spec.dtype)

    def _only_input(self, file: Path) -> InputSpec:
        if len(self._inputs) != 1:
            names = ", ".join(s.name for s in self._inputs)
            raise OptionError(f"{file}: the model has several inputs; expected .npz with {names}")
        return self._inputs[0]

    def _read_arrays(self, file: Path, whole: bool = True) -> tuple[dict[str, Array], Array | None]:
        """The inputs of a file, and its labels if it has some."""
        if file.suffix == ".npy":
            return {self._only_input(file).name: _load(file)}, None
        arrays = _load_all(file)
        labels = arrays.pop(LABEL_KEY, None) if whole else None
        arrays.pop(LABEL_KEY, None)
        if len(self._inputs) == 1 and len(arrays) == 1:
            arrays = {self._inputs[0].name: next(iter(arrays.values()))}
        wanted = {s.name for s in self._inputs}
        if set(arrays) != wanted:
            raise OptionError(
                f"{file}: expected the arrays {', '.join(sorted(wanted))}, found"
                f" {', '.join(sorted(arrays)) or 'none'}"
            )
        if whole and len({len(a) if a.ndim else -1 for a in arrays.values()}) != 1:
            raise OptionError(f"{file}: expected arrays with as many samples each")
        if labels is not None:
            labels = _as_classes(labels.reshape(-1), file)
        return arrays, labels

    def _read_labels(self, labels: Path | str, count: int) -> Array:
        if str(labels) == BY_FOLDER:
            if not self._files:
                raise OptionError(f"labels by folder: expected a folder, found {self._path}")
            if any(f.parent == self._path for f in self._files):
                raise OptionError(f"labels by folder: {self._path} has images in no class folder")
            names = sorted({f.relative_to(self._path).parts[0] for f in self._files})
            index = {name: i for i, name in enumerate(names)}
            return np.array([index[f.relative_to(self._path).parts[0]] for f in self._files])
        rows = _csv_rows(Path(labels))
        if not self._files:
            return np.array([r[1] for r in rows])
        by_name = dict(rows)
        found = []
        for file in self._files:
            relative = file.relative_to(self._path)
            spellings = (
                relative.as_posix(),
                file.name,
                relative.with_suffix("").as_posix(),
                file.stem,
            )
            known = [by_name[n] for n in spellings if n in by_name]
            if not known:
                raise OptionError(
                    f"{labels}: expected a row for each of {count}, none for {relative}"
                )
            found.append(known[0])
        return np.array(found)

    def _raw(self, file: Path, spec: InputSpec) -> Array:
        """A file's values as [1, ...]; an integer input takes them unchanged."""
        p, shape = self._preprocessing, spec.shape[1:]
        known = [n for n in shape if n is not None]
        if len(known) != len(shape):
            raise OptionError(f"{file}: input {spec.name}: raw values need a shape that is fixed")
        expected = math.prod(known) * _RAW[p.raw].itemsize
        try:
            found = file.stat().st_size
            content = file.read_bytes() if found == expected else None
        except OSError as error:
            raise OptionError(f"{file}: cannot be read: {error}") from error
        if content is None:
            raise OptionError(
                f"{file}: input {spec.name}: expected {expected} bytes, {p.raw} of shape {known},"
                f" found {found}"
            )
        if len(p.mean) + len(p.scale) > 2:
            raise OptionError("mean and scale: raw values take one of each")
        data: Array = np.frombuffer(content, _RAW[p.raw]).reshape(1, *known)
        if spec.dtype in _INTEGERS:
            return data
        reals: Array = (data.astype(np.float32) - np.float32(p.mean[0])) * np.float32(p.scale[0])
        return reals

    def _image(self, file: Path, spec: InputSpec) -> Array:
        """An image as [1, height, width, channels] or [1, channels, height, width]."""
        try:
            from PIL import Image, ImageOps
        except ImportError as error:
            raise OptionError(
                "reading images needs pillow: pip install 'stoker[export]'"
            ) from error
        p = self._preprocessing
        layout, channels, size = _image_shape(spec, p)
        try:
            with Image.open(file) as opened:
                image = ImageOps.exif_transpose(opened).convert("L" if channels == 1 else "RGB")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise OptionError(f"{file}: cannot be read as an image: {error}") from error
        if size is not None and (image.height, image.width) != size:
            bilinear = Image.Resampling.BILINEAR
            target = (size[1], size[0])
            if p.crop:
                image = ImageOps.fit(image, target, bilinear)
            else:
                image = image.resize(target, bilinear)
        pixels = np.asarray(image).reshape(image.height, image.width, channels)
        if p.bgr:
            pixels = pixels[..., ::-1]
        mean, scale = np.array(p.mean, np.float32), np.array(p.scale, np.float32)
        if max(len(mean), len(scale)) > channels:
            raise OptionError(f"mean and scale: the model has one channel, found {len(p.mean)}")
        if spec.dtype in _INTEGERS:  # an integer model does its own scaling
            data = pixels.astype(np.int16) - 128 if spec.dtype is np.int8 else pixels
        else:
            data = (pixels.astype(np.float32) - mean) * scale
        return data[None] if layout == "nhwc" else data.transpose(2, 0, 1)[None]


_INTEGERS = (np.int64, np.int32, np.int8, np.uint8, np.bool_)


def _image_shape(spec: InputSpec, p: Preprocessing) -> tuple[str, int, tuple[int, int] | None]:
    """Layout, channels and (height, width) of an image input; None if any size will do."""
    shape = spec.shape
    if len(shape) != 4:
        raise OptionError(
            f"input {spec.name}: expected four dimensions to give it images, found {len(shape)}"
        )
    layout = p.layout
    if layout is None:
        layout = "nchw" if shape[1] in (1, 3) and shape[3] not in (1, 3) else "nhwc"
    channels = shape[1] if layout == "nchw" else shape[3]
    height, width = shape[2:] if layout == "nchw" else shape[1:3]
    if channels not in (None, 1, 3):
        raise OptionError(
            f"input {spec.name}: expected 1 or 3 channels in layout {layout}, found {channels}"
        )
    size = p.size
    if height is not None and width is not None:
        if size is not None and size != (height, width):
            raise OptionError(f"size: the model takes {height}x{width}, found {size[0]}x{size[1]}")
        size = (height, width)
    return layout, channels or 3, size


def _files_in(folder: Path) -> list[Path]:
    """All files of the kind that is there, sorted; subfolders are searched, too."""
    found = [
        Path(base) / name
        for base, _, names in os.walk(folder)
        for name in names
        if not name.startswith(".")
    ]
    kinds = (
        [f for f in found if f.suffix.lower() in _IMAGES],
        [f for f in found if f.suffix == ".npy"],
        [f for f in found if f.suffix == ".npz"],
        [f for f in found if f.suffix == ".bin"],
    )
    used = [k for k in kinds if k]
    if len(used) > 1:
        raise OptionError(
            f"{folder}: expected images, .npy, .npz or .bin files, found more than one kind"
        )
    return sorted(used[0]) if used else []


def _load(file: Path) -> Array:
    try:
        loaded: Array = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise OptionError(f"{file}: cannot be read: {error}") from error
    if not isinstance(loaded, np.ndarray) or not loaded.ndim:
        raise OptionError(f"{file}: expected an array of samples")
    return loaded


def _load_all(file: Path) -> dict[str, Array]:
    from zipfile import BadZipFile

    try:
        with np.load(file, allow_pickle=False) as loaded:
            return {k: loaded[k] for k in loaded.files}
    except (OSError, ValueError, EOFError, BadZipFile, AttributeError) as error:
        raise OptionError(f"{file}: cannot be read: {error}") from error


def _csv_rows(path: Path) -> list[tuple[str, int]]:
    """(first column, last column) of each row; a first row without a number is a header."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = [r for r in csv.reader(file) if r]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise OptionError(f"{path}: cannot be read: {error}") from error
    found = []
    for i, row in enumerate(rows):
        try:
            found.append((row[0].strip(), int(row[-1])))
        except ValueError as error:
            if i:
                raise OptionError(
                    f"{path}: row {i + 1}: expected a class in the last column, found {row[-1]!r}"
                ) from error
    return found


def _as_classes(labels: Array, file: Path) -> Array:
    if labels.dtype.kind not in "iu":
        raise OptionError(f"{file}: expected integers as {LABEL_KEY}, found {labels.dtype}")
    return labels.astype(np.int64)


def _stacked(samples: list[dict[str, Array]]) -> dict[str, Array]:
    return {k: np.concatenate([s[k] for s in samples]) for k in samples[0]}

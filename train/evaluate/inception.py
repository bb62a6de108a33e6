"""FID and Inception score by torchmetrics, on the Inception network of the original evaluation, from a local file.

Two files hold that network (TensorFlow's inception-2015-12-05, whose own bilinear resize is part of it):
  inception-2015-12-05.pt                      NVIDIA's TorchScript archive; needs nothing else
  weights-inception-2015-12-05-6726825d.pth    weights for torch-fidelity, which must be installed, and torchvision
A TorchScript archive is a program: take it from its publisher.
"""
# B batch, n images, F features (2048), K classes (1008), H W pixels

from __future__ import annotations

import importlib.util
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from dcgen.tensors import Tensors
from train.evaluate.images import Drawn, pixels
from train.evaluate.measured import Column, Measured, batches, missing_files, seeds_apart
from train.evaluate.prompts import Prompt
from train.evaluate.spec import Fid, InceptionScore
from train.images import SUFFIXES
from train.inputs import Read, one_file, tree

INSTALL = "install it with `pip install torchmetrics` (the extra `eval` of this project); it takes your torch as it is"
FIDELITY = (
    "weights for torch-fidelity need torch-fidelity and the torchvision of your torch (`pip install --no-deps "
    "torch-fidelity`); the TorchScript file inception-2015-12-05.pt needs neither"
)
Network = Callable[[Tensor], Tensor]


def load_inception(path: Path, device: torch.device, output: str) -> Network:
    """A function from images (B,3,H,W) uint8 to `output`: "features" (B,F) or "logits" (B,K), float32.

    The logits are without bias, as the Inception score has them; from a TorchScript archive they come as logarithms of
    the probabilities, which softmax does not change.
    """
    if not is_torchscript(path):
        return _of_fidelity(path, device, output)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        network = torch.jit.load(str(path), map_location=device).eval()
    if output == "features":
        return lambda images: network(images, return_features=True).float()
    return lambda images: network(images, no_output_bias=True).float().clamp_min(1e-30).log()


def is_torchscript(path: Path) -> bool:
    """Whether a file is a TorchScript archive: a zip with code in it."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any("/code/" in name for name in archive.namelist())


def _of_fidelity(path: Path, device: torch.device, output: str) -> Network:
    Tensors.open(path)  # tensors alone: torch-fidelity unpickles whatever there is
    try:
        from torch_fidelity import FeatureExtractorInceptionV3
    except ImportError as error:
        raise ValueError(f"{path}: {FIDELITY} ({error})") from None
    name = "2048" if output == "features" else "logits_unbiased"
    network = FeatureExtractorInceptionV3("inception-v3-compat", [name], feature_extractor_weights_path=str(path))
    network = network.to(device).eval()
    return lambda images: network(images)[0].flatten(1).float()


def outputs(network: Network, images: Sequence[Drawn], batch: int, device: torch.device) -> Tensor:
    """(n, F or K) float32 on the CPU, of all images."""
    with torch.no_grad():
        return torch.cat([network(torch.stack(part).to(device)).cpu() for part in batches(images, batch, pixels)])


class _Given(nn.Module):
    """What torchmetrics takes for the network: the features are computed before."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.num_features = features

    def forward(self, features: Tensor) -> Tensor:
        return features


Statistics = tuple[np.ndarray, np.ndarray]


def statistics_of(features: Tensor) -> Statistics:
    """Mean (F,) and covariance (F,F) of features (n,F), float64."""
    array = features.double().numpy()
    if len(array) < 2:
        raise ValueError(f"FID needs at least two images on either side, there is {len(array)}")
    return array.mean(0), np.cov(array, rowvar=False).reshape(array.shape[1], array.shape[1])


def read_statistics(path: Path) -> Statistics:
    """mu (F,) and sigma (F,F) of a .npz as ADM publishes them."""
    try:
        with np.load(path, allow_pickle=False) as file:
            mean, covariance = (np.asarray(file[name], dtype=np.float64) for name in ("mu", "sigma"))
    except (KeyError, ValueError, OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: expected the arrays mu and sigma of ADM's reference statistics ({error})") from None
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)) or not np.isfinite(covariance).all():
        raise ValueError(f"{path}: mu is {mean.shape} and sigma {covariance.shape}, expected (F,) and (F, F), finite")
    return mean, covariance


def fid(features: Tensor, reference: Statistics) -> float:
    """Frechet Inception distance of features (n,F) to a reference, in float64, by torchmetrics."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    mean, covariance = (torch.from_numpy(part) for part in reference)
    if features.shape[1] != len(mean):
        raise ValueError(f"the reference has {len(mean)} features, the network {features.shape[1]}")
    if len(features) < 2:
        raise ValueError(f"FID needs at least two images, there is {len(features)}")
    metric = FrechetInceptionDistance(feature=_Given(len(mean)))
    metric.update(features.double(), real=False)
    # torchmetrics keeps sums, the reference has moments: these are the sums of two samples with such moments.
    metric.real_features_sum = 2 * mean
    metric.real_features_cov_sum = covariance + 2 * torch.outer(mean, mean)
    metric.real_features_num_samples = torch.tensor(2)
    return float(metric.compute())


def inception_score(logits: Tensor, splits: int) -> tuple[float, float]:
    """Mean and standard deviation over `splits` of exp(E KL(p(y|x) || p(y))) of logits (n,K), by torchmetrics.

    The images are shuffled first, with a fixed seed.
    """
    from torchmetrics.image.inception import InceptionScore as Score

    if len(logits) < splits:
        raise ValueError(f"{len(logits)} images cannot be split in {splits}; set metrics.inception_score.splits")
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that it keeps all logits, and that one split has no deviation
        torch.manual_seed(0)
        metric = Score(feature=_Given(logits.shape[1]), splits=splits)
        metric.update(logits.double())
        mean, deviation = metric.compute()
    return float(mean), float(deviation)


def missing_torchmetrics() -> list[str]:
    """A line where torchmetrics is not there."""
    return [] if importlib.util.find_spec("torchmetrics") else [f"the package torchmetrics is missing: {INSTALL}"]


class FidMetric:
    """FID to a reference of ADM's format, or to a folder of images."""

    columns: ClassVar[Mapping[str, Column]] = {"fid": Column("FID", "lower")}

    def __init__(self, config: Fid) -> None:
        self.config = config
        self._reference: Statistics | None = None

    def reads(self) -> dict[str, Read]:
        reference = Path(self.config.reference)
        read = one_file(reference) if reference.is_file() else Read(reference, images_below(reference))
        return {"inception": one_file(Path(self.config.inception)), "reference": read}

    def check(self) -> list[str]:
        found = missing_torchmetrics() + missing_files({"metrics.fid.inception": self.config.inception})
        if not Path(self.config.reference).exists():
            found.append(f"metrics.fid.reference {self.config.reference} is neither a .npz nor a folder of images")
        return found

    def measure(self, images: Sequence[Drawn], device: torch.device, work: Path) -> dict[str, Measured]:
        network = load_inception(Path(self.config.inception), device, "features")
        if self._reference is None:
            self._reference = self._read_reference(network, device)
        features = outputs(network, images, self.config.batch, device)
        by_seed = {str(seed): fid(features[places], self._reference) for seed, places in seeds_apart(images).items()}
        return {"fid": Measured(fid(features, self._reference), by_seed=by_seed)}

    def _read_reference(self, network: Network, device: torch.device) -> Statistics:
        path = Path(self.config.reference)
        if path.is_file():
            return read_statistics(path)
        files = images_below(path)
        if not files:
            raise ValueError(f"{path} holds no image ({', '.join(SUFFIXES)})")
        images = [Drawn(file, Prompt(""), number) for number, file in enumerate(files)]
        return statistics_of(outputs(network, images, self.config.batch, device))


def images_below(folder: Path) -> tuple[Path, ...]:
    """The image files of a folder and those in it: MJHQ-30K has one for each category."""
    return tuple(file for file in tree(folder).files if file.suffix.lower() in SUFFIXES)


class InceptionScoreMetric:
    """The Inception score; its spread is over the splits."""

    columns: ClassVar[Mapping[str, Column]] = {"inception_score": Column("Inception Score", "higher")}

    def __init__(self, config: InceptionScore) -> None:
        self.config = config

    def reads(self) -> dict[str, Read]:
        return {"inception": one_file(Path(self.config.inception))}

    def check(self) -> list[str]:
        return missing_torchmetrics() + missing_files({"metrics.inception_score.inception": self.config.inception})

    def measure(self, images: Sequence[Drawn], device: torch.device, work: Path) -> dict[str, Measured]:
        network = load_inception(Path(self.config.inception), device, "logits")
        logits = outputs(network, images, self.config.batch, device)
        mean, deviation = inception_score(logits, self.config.splits)
        by_seed = {
            str(seed): inception_score(logits[places], self.config.splits)[0]
            for seed, places in seeds_apart(images).items()
        }
        note = f"± {deviation:.2f} over {self.config.splits} splits" if self.config.splits > 1 else ""
        return {"inception_score": Measured(mean, by_seed=by_seed, note=note)}

"""Drawn images in MVTec's layout, train() in memory, a finished run, the scripts in process."""

import importlib.util
import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read by torch and BLAS when they are imported

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from tqdm import tqdm  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from ganomaly import cli
from ganomaly.data import MVTEC
from ganomaly.errors import guard

# The smallest run that still passes every stage
TINY = dict(image_size=32, width=4, latent_dim=8, batch_size=4, steps=6, amp="fp32")
# Another value for every Config field; test_config shows that each changes a run
CHANGES = {
    "dataset": "mnist", "category": "7", "image_size": 128, "channels": 3, "normalise": "exposure",
    "width": 5, "latent_dim": 9, "extra_layers": 1, "comparator_width": 3, "comparator_noise": 0.4,
    "corrupted": 0.5, "batch_size": 5, "steps": 7, "lr": 1e-3, "beta1": 0.8,
    "ema_decay": 0.1, "w_adv": 30.0, "w_con": 5.0, "w_enc": 30.0, "amp": "bf16",
    "score": "feature", "tta": True, "quantile": 0.5, "calibration_fraction": 0.5,
    "checkpoint_every": 2, "threads": 2, "seed": 1,
}  # fmt: skip
TINY_FLAGS = [f"--{key.replace('_', '-')}={value}" for key, value in TINY.items()]
EVERY = "--corrupted=.5 --comparator-width=3 --normalise=exposure --tta".split()  # part there is
CPU = torch.device("cpu")


def images(n: int, channels=3, size=32, seed=0) -> torch.Tensor:
    """Noise, uint8 (n, channels, size, size)."""
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, channels, size, size), dtype=torch.uint8, generator=rng)


class Memory:
    """What train() needs of a run: checkpoints, kept as bytes, and log records."""

    def __init__(self, checkpoint: bytes | None = None):
        self.checkpoint, self.saved, self.records = checkpoint, {}, []
        self.progress = tqdm(disable=True)

    def load(self):
        content = self.checkpoint
        return content and torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)

    def save(self, state):
        buffer = io.BytesIO()
        torch.save(state, buffer)
        self.saved[state["step"]] = buffer.getvalue()

    def state(self, step: int) -> dict:
        return torch.load(io.BytesIO(self.saved[step]), weights_only=True)

    def log(self, record):
        self.records.append(record)

    def preview(self, step, networks, scale):
        pass


def weights(trained) -> list[torch.Tensor]:
    return [v for network in trained.networks.values() for v in network.state_dict().values()]


def same(first, second) -> bool:
    """Whether two Trained have equal weights, bit for bit."""
    return all(torch.equal(a, b) for a, b in zip(weights(first), weights(second), strict=True))


def draw(path: Path, rng: np.random.Generator, defective: bool = False, size: int = 40) -> None:
    """A grey disc on noise; a defect is a bright bar across it."""
    y, x = np.mgrid[:size, :size] - size / 2
    pixels = 60 + 8 * rng.standard_normal((size, size, 3))
    pixels[np.hypot(x, y) < size / 3] += 80
    if defective:
        row = rng.integers(size // 4, 3 * size // 4)
        pixels[row : row + 4, size // 6 : -size // 6] = 250
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)


def draw_category(
    folder: Path, n_train=24, n_good=4, n_bad=5, defects=("a_bar",), seed=0, suffix="png"
) -> Path:
    """train/good, test/good and test/<defect>; `a_bar` sorts before `good`."""
    rng = np.random.default_rng(seed)
    places = {"train/good": n_train, "test/good": n_good}
    for place, n in {**places, **{f"test/{defect}": n_bad for defect in defects}}.items():
        for i in range(n):
            draw(folder / place / f"{i:03}.{suffix}", rng, defective=place not in places)
    return folder


def add_masks(
    root: Path, name="{}_mask.png", white=255, size=(40, 40), top="ground_truth", alpha=False
) -> None:
    """Masks of draw_category()'s bars; alpha: black ones, the bar is in their alpha channel."""
    for path in (root / "test" / "a_bar").glob("*.png"):
        with Image.open(path) as image:
            bar = np.asarray(image.convert("L")) > 240
        target = root / top / "a_bar" / name.format(path.stem)
        target.parent.mkdir(parents=True, exist_ok=True)
        levels = (bar * white).astype(np.uint8 if np.max(white) < 256 else np.uint16)
        image = Image.fromarray(levels).resize(size, Image.Resampling.NEAREST)
        if alpha:
            image = Image.merge("RGBA", [Image.new("L", size)] * 3 + [image])
        image.save(target, **({"quality": 95} if target.suffix == ".jpg" else {}))


@pytest.fixture(scope="session")
def parts(tmp_path_factory) -> Path:
    """A root with one category, `parts`; not to be changed."""
    root = tmp_path_factory.mktemp("images")
    draw_category(root / "parts")
    return root


@pytest.fixture(scope="session")
def fifteen(tmp_path_factory) -> Path:
    """A root with a small category for each of MVTec AD's names; not to be changed."""
    root = tmp_path_factory.mktemp("mvtec")
    for i, name in enumerate(MVTEC):
        draw_category(root / name, n_train=20, n_good=2, n_bad=2, seed=i)
    return root


def train_words(root, out, *more, category="parts") -> list:
    where = ["--dataset=folder", f"--category={category}", "--data-root", root]
    return [*where, "--experiments-dir", out, *TINY_FLAGS, *more]


def benchmark_words(root, out, *more) -> list:
    return ["--experiment=all", "--data-root", root, "--experiments-dir", out, *TINY_FLAGS, *more]


def folder_of(out: Path, category="parts", seed=42, name="local") -> Path:
    """The folder of a run in an experiments folder."""
    return out / name / category / f"seed{seed}"


def train(root, out, *more, category="parts") -> Path:
    """Run train.py; returns the folder of `local` for its category and seed 42."""
    words = train_words(root, out, *more, category=category)
    assert guard(load_script("train").main, [str(word) for word in words]) == 0
    return folder_of(out, category)


@pytest.fixture(scope="session")
def trained(parts, tmp_path_factory) -> Path:
    """An experiments folder with a finished run of `parts`; not to be changed."""
    with pytest.MonkeyPatch.context() as patch:  # as if killed before it deleted last.pt
        patch.setattr(Path, "unlink", lambda *_, **__: None)
        return train(parts, tmp_path_factory.mktemp("trained")).parents[2]


@pytest.fixture
def finished(trained, tmp_path) -> Path:
    """The folder of that run in a copy, as if train_words(parts, tmp_path) had trained it."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    return folder_of(tmp_path)


def committed(*words: str) -> list[Path]:
    """The files that git ls-files lists: tests read those, never what a user has run."""
    words = ["git", "ls-files", "-z", *words]
    listed = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not in a clone: which files git keeps is not known")
    return [ROOT / name for name in listed.stdout.split("\0") if name]


def load_script(name: str):
    """scripts/<name>.py as a module of its own."""
    spec = importlib.util.spec_from_file_location(f"script_{name}", ROOT / f"scripts/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def script(capsys, monkeypatch, tmp_path):
    """script("train", "--steps", "5") -> (exit code, stdout, stderr); sees no runs of the user."""
    monkeypatch.setattr(cli, "RUNS", tmp_path / "experiments")

    def call(name: str, *words) -> tuple[int, str, str]:
        module = load_script(name)
        capsys.readouterr()
        code = guard(module.main, [str(word) for word in words])
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture(autouse=True)
def settings_of_the_process():
    """Scripts set the threads and the algorithms of the process; no test may see another's."""
    torch.set_num_threads(1)
    yield
    torch.use_deterministic_algorithms(False)

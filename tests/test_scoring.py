import copy
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from ganomaly import detector as detectors
from ganomaly import scoring
from ganomaly.batches import from_input, to_input
from ganomaly.config import Config
from ganomaly.detector import Detector, load_detector
from ganomaly.device import use_device
from ganomaly.errors import UserError
from ganomaly.networks import build, initialise
from ganomaly.packed import Packed, packed
from ganomaly.scoring import calibrate, fit, p_values, share_above, threshold_at, whitened

from .conftest import CPU, ROOT, images

SMALL = Config(image_size=32, width=4, latent_dim=8, corrupted=0.5, comparator_width=3)
SIGNED = {"comparator": 1e-6, "spot": 1e-6}  # scores that cross 0, and what may be added to them
SIGNED |= dict.fromkeys(("calibrated", "small_or_large", "spot_or_area"), 1e-5)


@pytest.fixture(scope="module")
def detector() -> Detector:
    """An untrained network whose BatchNorm statistics have moved, calibrated on noise."""
    rng = torch.Generator().manual_seed(0)
    networks = build(SMALL)
    for network in networks.values():
        initialise(network, rng)
    for seed in range(5):
        x = images(16, seed=seed) / 127.5 - 1
        x_hat = networks["generator"](x)[1]
        networks["discriminator"](x), networks["comparator"](x, x_hat)
    ours = Detector(networks, SMALL, CPU)
    ours.calibrate(images(20, seed=9))
    return ours


def close(a: dict, b: dict) -> bool:
    return all(torch.allclose(a[n], b[n], rtol=1e-5, atol=SIGNED.get(n, 0)) for n in a)


def test_a_score_does_not_depend_on_batch_size_order_or_batch_mates(detector, monkeypatch):
    pixels = images(23, seed=3)
    whole = detector.scores(pixels)
    for size in (1, 5, 23):
        monkeypatch.setattr(detectors, "PASS_IMAGES", size)
        assert close(whole, detector.scores(pixels))
    monkeypatch.setattr(detectors, "PASS_IMAGES", 8)
    turned = detector.scores(pixels.flip(0))
    assert close(whole, {name: values.flip(0) for name, values in turned.items()})
    black = torch.zeros_like(pixels)
    black[4] = pixels[4]
    among_black = detector.scores(black)
    assert close({n: v[4] for n, v in whole.items()}, {n: v[4] for n, v in among_black.items()})


def test_a_pass_holds_as_many_images_as_its_pixels_allow(detector, monkeypatch):
    sizes = []
    monkeypatch.setattr(detectors, "PASS_PIXELS", 5 * 32 * 32)
    detector.map_batches(images(12), lambda o, _: sizes.append(len(o.x)) or o.x)
    assert sizes == [5, 5, 2]


@pytest.mark.parametrize("n, size, extra_layers", [(3, 32, 1), (1, 128, 0)])
def test_packed_weights_give_the_networks_outputs(n, size, extra_layers, monkeypatch):
    config = SMALL.replace(image_size=size, width=16, extra_layers=extra_layers)
    networks = build(config)
    for network in networks.values():
        initialise(network, torch.Generator().manual_seed(1))
    ours = Detector(networks, config, CPU)
    assert all(network.training for network in networks.values())  # it works on copies
    assert any(isinstance(m, Packed) for m in ours.scoring_networks["generator"].modules())
    pixels = images(n, size=size, seed=2)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    plain = Detector(networks, config, CPU)
    assert plain.scoring_networks == plain.networks
    for a, b in zip(copy.deepcopy(ours).outputs(pixels), plain.outputs(pixels), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)
    # Only padding with zeros can be packed
    x, layer = images(1, 1) / 255, torch.nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect")
    with torch.inference_mode():
        assert torch.equal(packed(layer)(x), layer(x))


def test_scores_are_their_formulas(detector):
    pixels = images(3, seed=5)
    scores = detector.scores(pixels)
    x = pixels.float() / 127.5 - 1
    with torch.no_grad():
        z, x_hat, z_hat = detector.networks["generator"](x)
        f, f_hat = (detector.networks["discriminator"](image)[1] for image in (x, x_hat))
    literal = {
        "latent": (z - z_hat) ** 2,
        "latent_l1": abs(z - z_hat),
        "contextual": abs(x - x_hat),
        "feature": (f - f_hat) ** 2,
    }
    for name, values in literal.items():
        assert torch.allclose(scores[name], values.flatten(1).mean(1), rtol=1e-4), name


def test_networks_that_diverged_have_no_scores(detector):
    networks = copy.deepcopy(detector.networks)
    torch.nn.init.constant_(networks["generator"].encoder2.head.weight, math.inf)
    with pytest.raises(UserError, match="is not finite: the training diverged"):
        Detector(networks, SMALL, CPU).calibrate(images(20))


def outputs(x: torch.Tensor, x_hat: torch.Tensor, logits=None) -> scoring.Outputs:
    return scoring.Outputs(x, x_hat, *[torch.zeros(len(x), 1)] * 4, logits)


def smooth(n, seed=0):
    """Smooth images in [-.5, .5]."""
    cells = torch.rand(n, 3, 4, 4, generator=torch.Generator().manual_seed(seed)) - 0.5
    return torch.nn.functional.interpolate(cells, (32, 32), mode="bilinear")


def test_the_residual_map_is_of_what_is_missing_not_of_its_noise():
    x = smooth(2)
    checks = 0.3 * (-1.0) ** (torch.arange(32)[:, None] + torch.arange(32))
    assert scoring.residual_map(outputs(x, x + checks)).max() < 0.3 / 8  # a corner has nine pixels
    offset = scoring.residual_map(outputs(x, x + 0.3))
    assert torch.allclose(offset, torch.full_like(offset, 0.3), atol=1e-5)


def test_the_gradient_map_sees_structure_not_brightness():
    x = smooth(2)
    assert scoring.gradient_map(outputs(x, x + 0.3)).abs().max() < 1e-3
    a, b, c = 0.5, 0.2, 0.0104  # slopes of two ramps: Prewitt's response is theirs times two
    ramp = torch.arange(32.0).expand(1, 3, 32, 32) / 32
    first_scale = 1 - (2 * a * b + c) / (a * a + b * b + c)
    one = scoring.gradient_magnitude(ramp[:, :1] * 16 * a)[0, 0, 16, 16]
    assert one == pytest.approx(a, rel=1e-4)
    four = scoring.gradient_map(outputs(ramp * 16 * a, ramp * 16 * b))[0, 16, 16]
    scales = [1 - (2 * a * b * k + c) / ((a * a + b * b) * k + c) for k in (1, 4, 16, 64)]
    assert four == pytest.approx(sum(scales) / 4, rel=0.05) and four > first_scale


def test_blurred_is_a_gaussian_of_one_pixel_and_contrast_a_deviation_under_it():
    m = torch.zeros(2, 16, 16)
    m[0, 8, 8] = m[1, 7, 6] = 1
    out = scoring.blurred(m)
    assert out.sum((1, 2)).tolist() == pytest.approx([1, 1]) and out[0, 8, 8] == out[1, 7, 6]
    for shift in (1, 2, 3):
        expected = out[0, 8, 8] * math.exp(-(shift**2) / 2)
        assert out[0, 8 + shift, 8].item() == pytest.approx(float(expected), rel=1e-5)
    assert out[0, 8, 12] == 0
    share = float(out[0, 8, 8])  # of the one pixel, under the window around it
    dot = scoring.contrast(outputs(m[:, None] - 0.2, m))
    assert dot[0, 8, 8].item() == pytest.approx(math.sqrt(share - share**2), rel=1e-5)


def test_scores_of_maps_are_means_of_their_highest_pixels(detector):
    o = detector.outputs(images(3, seed=6))
    scores = scoring.raw_scores(scoring.measure(o)).scores
    residual, gradient = scoring.residual_map(o), scoring.gradient_map(o)
    comparator, relative = scoring.blurred(o.logits), residual / (0.4 + scoring.contrast(o))
    for name, values, n in (
        ("residual", residual, 10), ("gradient", gradient, 10),  # a hundredth of 32 x 32 pixels
        ("residual_wide", residual, 102), ("comparator", comparator, 1),
        ("area", relative, 102), ("spot", comparator + 10 * gradient, 1),
    ):  # fmt: skip
        highest = values.flatten(1).sort(descending=True).values[:, :n]
        assert torch.allclose(scores[name], highest.mean(1)), name
    assert torch.equal(scoring.measure(o._replace(logits=None)).maps["spot"], 10 * gradient)
    assert scoring.mean_of_highest(torch.tensor([[[1.0, 5.0]]]), 0.01).item() == 5


def test_standardised_scores_against_their_formulas():
    normal, new = (raw_scores(gaps(30, 4, seed)) for seed in (0, 1))
    ours = scoring.all_scores(new, scoring.fit(normal))
    z = {n: (new.scores[n] - s.mean()) / s.std() for n, s in normal.scores.items()}
    calibrated = (z["residual"] + z["gradient"] + z["comparator"]) / 3
    assert torch.allclose(ours["calibrated"], calibrated, atol=1e-5)
    both = (z["gradient"] + z["comparator"]) / 2
    pairs = ("small_or_large", both, "residual_wide"), ("spot_or_area", z["spot"], "area")
    for name, small, large in pairs:
        assert 0 < (small > z[large]).sum() < 30
        assert torch.allclose(ours[name], small.maximum(z[large]), atol=1e-5), name
    for raw in (normal, new):  # of networks without a comparator
        del raw.scores["comparator"]
    fewer = scoring.all_scores(new, scoring.fit(normal))
    expected = z["gradient"].maximum(z["residual_wide"])
    assert torch.allclose(fewer["small_or_large"], expected, atol=1e-5)


def test_heat_maps_share_one_scale_with_the_calibrated_score(detector):
    pixels = images(5, seed=8)
    heat = detector.heat_maps(pixels)
    assert heat.shape == (5, 32, 32) and heat.dtype == torch.float32
    known = detector.statistics.parts
    maps = scoring.measure(detector.outputs(pixels)).maps
    literal = [(maps[n] - known[n][0]) / known[n][1] for n in scoring.PARTS]
    assert torch.allclose(heat, torch.stack(literal).mean(0), atol=1e-4)


def test_test_time_augmentation_averages_over_images_moved_by_a_pixel(detector):
    networks, pixels = detector.networks, images(3, seed=8)

    def padded(x):
        return F.pad(x, (1, 1, 1, 1), mode="replicate")

    total, edge = 0, padded(to_input(pixels, CPU))
    with torch.inference_mode():
        for top, left in ((1, 1), (0, 1), (2, 1), (1, 0), (1, 2)):
            view = edge[:, :, top : top + 32, left : left + 32]
            m = scoring.measure(detectors.outputs_of(networks, view))
            back = slice(2 - top, 34 - top), slice(2 - left, 34 - left)
            maps = [padded(one[:, None])[:, 0, back[0], back[1]] for one in m.maps.values()]
            values = [*maps, *(v[:, None, None] for v in m.scores.values()), m.gaps[:, None]]
            flat = torch.cat([v.flatten(1).double() for v in values], 1)
            total = total + flat * (1 / 2 if top == left else 1 / 8)
    ours = copy.copy(detector)
    ours.config = SMALL.replace(tta=True)
    ours.set_quantile()
    assert ours.batch == detector.batch // 4
    m, heat = ours.map_batches(pixels, lambda _, m: m), ours.heat_maps(pixels)
    values = [*m.maps.values(), *m.scores.values(), m.gaps]
    flat = torch.cat([v.reshape(3, -1).double() for v in values], 1)
    assert torch.allclose(flat, total, rtol=1e-4, atol=1e-5)
    assert torch.equal(heat, scoring.heat_map(m, detector.statistics))
    assert torch.allclose(ours.explain(pixels)[2], heat, atol=1e-5)


def test_scores_are_float32_whatever_the_training_precision(detector):
    expected, heat = detector.scores(images(2)), detector.heat_maps(images(2))
    assert {values.dtype for values in expected.values()} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        assert close(expected, detector.scores(images(2)))
        assert torch.equal(heat, detector.heat_maps(images(2)))


def gaps(n, dim, seed):
    """z - z_hat (n, dim) of correlated Gaussian noise."""
    rng = np.random.default_rng(seed)
    mixing, offset = rng.standard_normal((dim, dim)), rng.standard_normal(dim)
    noise = np.random.default_rng(seed + 1000).standard_normal((n, dim))
    return torch.from_numpy(noise @ mixing + offset)


def test_whitened_is_the_mean_square_of_the_gaps_on_the_axes_of_normal_ones():
    fitted = fit(raw_scores(gaps(60, 6, 1)))
    mean, precision = fitted.mean, fitted.precision
    fresh = gaps(10, 6, 1) * 1.5
    distances = torch.linalg.cholesky(precision).T @ (fresh - mean).T
    expected = distances.square().mean(0).float()
    assert torch.allclose(whitened(fresh, mean, precision), expected, rtol=1e-5)


def raw_scores(normal: torch.Tensor) -> scoring.Measured:
    """Raw scores of z - z_hat (N, dim); its first columns stand for MAP_SCORES."""
    columns = normal[:, :3].T.float()
    scores = dict(zip(scoring.PARTS, columns)) | {"residual_wide": columns.square().sum(0)}
    scores |= {"spot": columns[:2].amax(0), "area": scores["residual_wide"] + columns[2]}
    return scoring.Measured({}, scores, normal)


@pytest.mark.parametrize("score", scoring.FITTED_SCORES)
@pytest.mark.parametrize("n, dim, quantile", [(42, 100, 0.95), (42, 20, 0.8), (500, 20, 0.95)])
def test_false_alarms_are_those_that_the_threshold_names(n, dim, quantile, score):
    """The rate of one draw of calibration images varies, so this is over many draws."""
    draws, fresh = 60, 50
    alarms = 0
    for draw in range(draws):
        everything = gaps(n + fresh, dim, seed=draw)
        normal, test = raw_scores(everything[:n]), raw_scores(everything[n:])
        statistics, normal_scores = calibrate(normal, seed=draw)
        threshold = threshold_at(normal_scores[score], quantile)
        named = share_above(n, quantile)
        scores = scoring.all_scores(test, statistics)[score]
        alarms += int((scores > threshold).sum())
    trials = draws * fresh
    # Images of one draw share a threshold, so the rate spreads by the n calibration ranks too.
    error = math.sqrt(named * (1 - named) * (1 / trials + 1 / (draws * n)))
    assert named <= 1 - quantile + 1e-9
    assert alarms / trials < named + 3 * error
    # Four fifths of few images fit worse than all of them, so fewer false alarms than named; with
    # enough images the two agree. Half of the named rate says that defects are not given away.
    assert alarms / trials > (named - 3 * error if n == 500 else named / 2 - 3 * error)


def test_threshold_is_the_conformal_rank():
    for n, quantile, rank in ((19, 0.95, 19), (42, 0.95, 41), (10, 0.95, 10), (9, 1e-12, 1)):
        scores = torch.arange(1, n + 1).float().flip(0)
        assert threshold_at(scores, quantile) == rank
        assert share_above(n, quantile) == 1 - rank / (n + 1)


def test_there_are_five_folds_of_equal_size(monkeypatch):
    sizes = []
    monkeypatch.setattr(scoring, "fit", lambda raw: sizes.append(len(raw.gaps)) or fit(raw))
    calibrate(raw_scores(gaps(12, 3, 0)), seed=0)
    assert sorted(sizes) == [9, 9, 10, 10, 10, 12]


class Malicious:
    def __reduce__(self):
        return os.system, ("touch pwned",)


def test_what_is_not_a_model_is_refused_in_one_line(detector, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path, state = tmp_path / "bad.pt", detector.state()
    bad = [
        b"hello",
        {"config": Malicious()},
        {"generator": state["networks"]["generator"]},
        {**state, "config": Config().to_json()},
        {**state, "statistics": {**state["statistics"], "other": 3}},
        {**state, "scores": {"feature": torch.ones(1)}},  # not the headline score
        {**state, "scores": {**state["scores"], "best": torch.ones(1)}},
    ]
    for content in bad:
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        with pytest.raises(UserError, match="bad.pt: not a model.pt") as error:
            load_detector(path, CPU)
        assert "\n" not in str(error.value)
    torch.save([1, 2], path)
    with pytest.raises(UserError, match="finished run \\(holds no names\\)"):
        load_detector(path, CPU)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_scores_are_those_of_the_cpu(detector, tmp_path):
    torch.save(detector.state(), tmp_path / "model.pt")
    on_gpu = load_detector(tmp_path / "model.pt", use_device("cuda"))
    expected, scores = detector.scores(images(30)), on_gpu.scores(images(30))
    for name, values in expected.items():
        crosses_0 = name in SIGNED
        assert torch.allclose(values, scores[name], rtol=1e-4, atol=1e-4 * crosses_0), name


def test_p_values_are_ranks_and_agree_with_the_threshold():
    rng = torch.Generator().manual_seed(0)
    normal = torch.randn(40, generator=rng)
    fresh = torch.cat([torch.randn(2000, generator=rng), normal])
    p = p_values(normal, fresh)
    assert p.min() >= 1 / 41 and p.max() == 1
    for quantile in (0.5, 0.9, 0.95, 0.99):
        threshold, above = threshold_at(normal, quantile), share_above(40, quantile)
        assert torch.equal(fresh > threshold, p <= above + 1e-12)
    assert p_values(torch.tensor([1.0, 2.0, 2.0]), torch.tensor([2.0])) == 0.75  # ties count


def test_a_detector_is_called_with_tensors_or_files(detector, tmp_path):
    pixels = images(3, seed=4)
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for path, image in zip(paths, pixels):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    scores, p, defective = detector(pixels)
    assert torch.equal(scores, detector.scores(pixels)[SMALL.score])
    assert torch.equal(defective, scores > detector.threshold)
    assert torch.equal(p, p_values(detector.normal, scores))
    names = np.array([*map(str, paths)], dtype=object)  # as a column of a table has them
    assert all(map(torch.equal, detector(names), (scores, p, defective)))
    assert detector(str(paths[0])).scores.shape == (1,)  # not letter by letter
    assert torch.equal(detector(pixels.numpy()[:, ::-1])[0], detector(pixels.flip(1))[0])
    floats = pixels.double().numpy()
    for wrong in (floats, pixels[:, :1], pixels[..., :16], pixels[0], [floats], b"a.png"):
        with pytest.raises(ValueError, match=r"uint8 (of \(N, 3, 32, 32\) is needed|tensor)"):
            detector(wrong)
    assert [len(values) for values in detector(pixels[:0])] == [0, 0, 0]


def test_a_reconstruction_is_shown_in_the_exposure_of_its_image():
    pixels = images(4, seed=2)
    for scale in (None, 0.7):
        assert torch.equal(from_input(to_input(pixels, CPU, scale), pixels, scale), pixels)
    darker = (pixels.float() / 2).round().to(torch.uint8)
    shown = from_input(to_input(pixels, CPU, 0.7), darker, 0.7)
    assert (shown.int() - darker.int()).abs().max() <= 1


def test_importing_the_package_imports_no_torch(tmp_path):
    code = "import sys, ganomaly; assert 'torch' not in sys.modules; print(ganomaly.load.__doc__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "model.pt" in done.stdout, done.stderr

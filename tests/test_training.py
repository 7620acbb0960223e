import copy
import math

import pytest
import torch
import torch.nn.functional as F

from ganomaly import losses, training
from ganomaly.config import Config
from ganomaly.corruption import Corruption
from ganomaly.errors import UserError
from ganomaly.networks import Generator, build, initialise
from ganomaly.training import AMP, resolve_amp, train

from .conftest import CPU, TINY, Memory, images, same, weights

SMALL = Config(**TINY, checkpoint_every=3)
OURS, NOISE = dict(corrupted=0.5, comparator_width=4), dict(comparator_noise=0.6)
FULL = SMALL.replace(**OURS, **NOISE, normalise="exposure")
PIXELS = images(14)


def loud(network, rng):
    """initialise(), with ten times the weights in the generator: its images differ clearly then."""
    initialise(network, rng)
    if isinstance(network, Generator):
        for weight in network.parameters():
            weight.data.mul_(10 if weight.dim() > 1 else 1)


def literal(config: Config, pixels: torch.Tensor):
    """Equations 1 to 4, the comparator's loss and all updates written out.

    Only the networks, the corruption and the seeds of their numbers are shared. Returns D and the
    running averages by name.
    """
    networks = build(config)
    rng = torch.Generator().manual_seed(config.seed)
    rng_c = torch.Generator().manual_seed(config.seed + 2**31)
    for name, network in networks.items():
        loud(network, rng_c if name == "comparator" else rng)
        network.to(memory_format=torch.channels_last)  # the same kernels, the same rounding
    g, d, c = (networks.get(name) for name in ("generator", "discriminator", "comparator"))
    average = {n: copy.deepcopy(net).eval() for n, net in networks.items() if net is not d}
    adam = dict(lr=config.lr, betas=(config.beta1, 0.999), fused=True)
    opt_g, opt_d = (torch.optim.Adam(network.parameters(), **adam) for network in (g, d))
    if c:
        opt_c = torch.optim.Adam(c.parameters(), lr=1e-3, fused=True)
    n, size, order = config.n_corrupted, config.batch_size, []
    corruption = Corruption(pixels, config.seed + 2**30, None)
    for step in range(1, config.steps + 1):
        while len(order) < size:
            order += torch.randperm(len(pixels), generator=rng).tolist()
        x = (pixels[order[:size]].float() / 255 - 0.5) / 0.5
        x = x.contiguous(memory_format=torch.channels_last)
        del order[:size]
        seen, truth = x.clone(), torch.zeros_like(x[:, 0])  # truth: where it is corrupted
        if n:
            seen[:n], truth[:n] = corruption(x[:n])
        z, x_hat, z_hat = g(seen)
        # Both gradients are at the weights before the step. D's real images are clean. The BCE of a
        # logit v is softplus(-v) against 1 and softplus(v) against 0
        real, fake = d(x)[0], d(x_hat.detach())[0]
        loss_d = 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())
        f, f_hat = d(x)[1].detach(), d(x_hat)[1]
        loss_g = (
            config.w_adv * ((f - f_hat) ** 2).mean()
            + config.w_con * (x - x_hat).abs().mean()
            + config.w_enc * ((z - z_hat)[n:] ** 2).mean()
        )
        opt_g.zero_grad()
        loss_g.backward()
        opt_d.zero_grad()  # loss_g has left gradients in D
        loss_d.backward()
        opt_g.step()
        opt_d.step()
        if c:
            if config.comparator_noise:  # reconstructions by the running average, of noisy codes
                code, decoder = average["generator"].encoder1(seen), average["generator"].decoder
                strength = 1.2 * torch.rand(size, 1, generator=rng_c)  # 0.6 in the mean
                noise = strength * torch.randn(code.shape, generator=rng_c)
                x_hat = decoder(code + noise * code.std(0))
            p = c(seen, x_hat.detach()).sigmoid()
            right = torch.where(truth == 1, p, 1 - p)  # the probability of the true answer
            weight = torch.where(truth == 1, 5.0, 1.0)
            opt_c.zero_grad()
            (-weight * (1 - right) ** 2 * right.log()).mean().backward()
            opt_c.step()
        decay = min(config.ema_decay, step / (step + 10))
        for name in average:
            latest = networks[name].state_dict().values()
            for value, new in zip(average[name].state_dict().values(), latest):
                if value.is_floating_point():
                    value.copy_(decay * value + (1 - decay) * new)
    return d, average


@pytest.mark.parametrize("ema_decay", (0.2, 0.9))
@pytest.mark.parametrize("changes", ({}, dict(batch_size=33), OURS, OURS | NOISE), ids=str)
def test_training_is_the_algorithm_written_out(ema_decay, changes, monkeypatch):
    monkeypatch.setattr(training, "initialise", loud)
    # 14 images: a batch of 33 takes the last of one pass, a whole one, and the first of the next
    config = SMALL.replace(ema_decay=ema_decay, **changes)
    trained = train(config, PIXELS, CPU, Memory())
    d, average = literal(config, PIXELS)
    pairs = [*zip(d.parameters(), trained.networks["discriminator"].parameters())]
    for name, network in average.items():
        values = trained.networks[name].state_dict().values()
        pairs += zip(network.state_dict().values(), values, strict=True)
    difference = torch.cat([(a - b).abs().flatten() for a, b in pairs])
    # A step moves a weight by about lr; only rounding may differ
    assert difference.mean() < 0.002 * config.lr


def test_losses_are_means_in_float32_whatever_comes_in():
    a, b = (kind(2, 3, 4, 4, dtype=torch.float16) for kind in (torch.ones, torch.zeros))
    for name in ("adversarial", "contextual", "encoder", "discriminator", "comparator"):
        loss = getattr(losses, name)
        assert loss(a, b).dtype == torch.float32
    # The float16 sum of 70,000 ones is infinite
    many = torch.ones(70_000, dtype=torch.float16)
    assert losses.contextual(many, torch.zeros_like(many)).item() == 1
    # A factor of these two changes no step of Adam, but the log
    nothing = torch.zeros(6)
    assert losses.discriminator(nothing, nothing).item() == pytest.approx(math.log(2))
    assert losses.comparator(nothing, nothing).item() == pytest.approx(math.log(2) / 4)
    # Logits that a sigmoid would saturate
    assert losses.discriminator(torch.tensor([-200.0]), torch.tensor([200.0])).item() == 200


@pytest.mark.parametrize("amp", ("fp32", "bf16", "fp16"))
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(amp):
    whole, config = Memory(), FULL.replace(amp=amp, checkpoint_every=4)
    expected = train(config, PIXELS, CPU, whole)
    for step in (4, 6):  # the last one is not trained further
        assert same(expected, train(config, PIXELS, CPU, Memory(whole.saved[step])))
    changes = dict(steps=110, checkpoint_every=60, w_adv=2.0, w_con=3.0, w_enc=4.0)
    whole, config = Memory(), SMALL.replace(amp=amp, **changes)
    expected = train(config, PIXELS, CPU, whole)
    assert sorted(whole.saved) == [60, 110]
    resumed = Memory(whole.saved[60])
    assert same(expected, train(config, PIXELS, CPU, resumed))
    # The losses logged at step 100 cover steps 51 to 100, ten of them before the checkpoint.
    (record,) = resumed.records
    names = "discriminator adversarial contextual encoder generator comparator".split()
    assert record["step"] == 100 and record.keys() >= set(names)
    assert all(record[name] == whole.records[1][name] for name in record if "second" not in name)
    total = 2 * record["adversarial"] + 3 * record["contextual"] + 4 * record["encoder"]
    assert record["generator"] == pytest.approx(total, rel=1e-5) and record["comparator"] == 0


def test_a_checkpoint_of_other_images_or_another_device_is_refused():
    whole, elsewhere = Memory(), Memory()
    train(SMALL, PIXELS, CPU, whole)
    elsewhere.save({**whole.state(3), "device": "cuda"})
    for pixels, memory in ((images(14, seed=1), whole), (PIXELS, elsewhere)):
        with pytest.raises(UserError, match="other training images or another kind of device"):
            train(SMALL, pixels, CPU, Memory(memory.saved[3]))


def test_both_losses_are_scaled_in_fp16(monkeypatch):
    scaled, real = [], torch.amp.GradScaler.scale
    monkeypatch.setattr(torch.amp.GradScaler, "scale", lambda *a: scaled.append(a[1]) or real(*a))
    train(SMALL.replace(amp="fp16"), PIXELS, CPU, Memory())
    assert len(scaled) == 2 * SMALL.steps


def test_fp16_overflow_skips_the_update_and_halves_the_scale(monkeypatch):
    real, steps, memory = training.losses.contextual, [], Memory()

    def infinite(x, x_hat):
        steps.append(1)
        if len(steps) == 13:  # a finite loss, an infinite gradient
            x_hat.register_hook(lambda grad: grad * float("inf"))
        return real(x, x_hat)

    monkeypatch.setattr(training.losses, "contextual", infinite)
    trained = train(SMALL.replace(amp="fp16", checkpoint_every=6, steps=18), PIXELS, CPU, memory)
    assert all(value.isfinite().all() for value in weights(trained))
    before, after = (memory.state(step)["scaler"]["scale"] for step in (6, 18))
    assert after == before / 2


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(monkeypatch):
    real, factors, memory = losses.encoder, iter([1, 1, 1, 1, math.inf, 1]), Memory()
    monkeypatch.setattr(losses, "encoder", lambda *z: real(*z) * next(factors))
    with pytest.raises(UserError, match=r"not finite at step 6 .*--lr.*checkpoint is kept"):
        train(SMALL, PIXELS, CPU, memory)
    assert sorted(memory.saved) == [3]


def test_amp_auto_is_bf16_where_the_device_has_it(monkeypatch):
    assert [resolve_amp(amp, CPU) for amp in AMP] == list(AMP)
    for has, expected in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda has=has: has)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        assert resolve_amp("auto", CPU) == expected
    for has, expected in ((True, "bf16"), (False, "fp16")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda has=has, **_: has)
        assert resolve_amp("auto", torch.device("cuda")) == expected


def test_weights_that_are_not_finite_are_not_kept(monkeypatch):
    monkeypatch.setattr(torch, "_foreach_lerp_", lambda _, latest, __: latest[0].fill_(math.nan))
    memory = Memory()
    with pytest.raises(UserError, match="not finite"):
        train(SMALL.replace(checkpoint_every=1), PIXELS, CPU, memory)
    assert not memory.saved

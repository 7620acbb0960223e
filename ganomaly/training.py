"""train(): the alternating updates of GANomaly as one linear function.

It knows nothing of folders: `recorder` keeps log records and checkpoints, and shows progress.
"""

import copy
import hashlib
import math
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ganomaly import losses, replay
from ganomaly.batches import batches, fitted_scale, to_input
from ganomaly.config import Config
from ganomaly.corruption import Corruption
from ganomaly.errors import UserError, flag
from ganomaly.networks import build, initialise

LOG_EVERY = 50  # steps between log records; then, and at checkpoints, the host waits
AMP = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}  # None: no autocast
LR_COMPARATOR = 1e-3  # with Adam's default betas, as the comparator has no adversary


@dataclass
class Trained:
    networks: dict[str, nn.Module]  # the discriminator's last weights, the others' running average
    scale: float | None  # of the normalised input, see batches.to_input
    seconds: float  # of training, checkpoints left out


def train(config: Config, images: Tensor, device: torch.device, recorder) -> Trained:
    """Train on normal images (N, C, S, S) in uint8 for config.steps steps.

    recorder.load() returns the checkpoint to go on from, or None. Every LOG_EVERY steps
    recorder.log(record) takes the mean losses since the last record. recorder.preview(step,
    networks, scale) may look at the networks before each recorder.save(state). recorder.progress is
    a tqdm.

    UserError where the checkpoint is of other images or another kind of device, and where a loss or
    a weight is not finite. The last checkpoint stays.
    """
    # Networks, optimisers, data. One random stream serves initialisation and batches. Comparator
    # and corruption have their own, so that the generator starts alike with and without them. Their
    # seeds are the config's with one bit flipped. A generator on the CPU keeps only 32 bits
    rng = torch.Generator().manual_seed(config.seed)
    rng_c = torch.Generator().manual_seed(config.seed ^ (1 << 31))
    networks = build(config)
    for name, network in networks.items():
        initialise(network, rng_c if name == "comparator" else rng)
        network.to(device, memory_format=torch.channels_last).train()
    generator, discriminator = networks["generator"], networks["discriminator"]
    comparator = networks.get("comparator")
    averages = {n: copy.deepcopy(net) for n, net in networks.items() if n != "discriminator"}
    adam = partial(torch.optim.Adam, fused=True, capturable=device.type == "cuda")
    settings = dict(lr=config.lr, betas=(config.beta1, 0.999))
    weights_g, weights_d = list(generator.parameters()), list(discriminator.parameters())
    optimizer_g, optimizer_d = adam(weights_g, **settings), adam(weights_d, **settings)
    learning = {**networks, "optimizer_g": optimizer_g, "optimizer_d": optimizer_d}
    if comparator is not None:
        optimizer_c = adam(comparator.parameters(), lr=LR_COMPARATOR)
        learning["optimizer_c"] = optimizer_c
    amp = AMP[resolve_amp(config.amp, device)]
    scaler = torch.amp.GradScaler(device.type, enabled=amp == torch.float16)
    fingerprint = hashlib.sha256(images.numpy()).hexdigest()
    scale = fitted_scale(images) if config.normalise == "exposure" else None
    images, picks = images.to(device), batches(len(images), config.batch_size, rng)
    stateful = {**learning, **{f"average_{name}": average for name, average in averages.items()}}
    stateful["scaler"] = scaler
    corruption, rngs, n_corrupted = None, [rng_c], config.n_corrupted
    if n_corrupted:
        corruption = Corruption(images, config.seed ^ (1 << 30), scale)
        rngs += [corruption.host, corruption.rng]
    sums = defaultdict(lambda: torch.zeros((), device=device))  # losses since the record before
    step, seconds = 0, 0.0

    # Go on from a checkpoint, exactly
    if (state := recorder.load()) is not None:
        there, here = (state["images"], state["device"]), (fingerprint, device.type)
        if there != here:
            raise UserError(
                "the checkpoint is of other training images or another kind of device; "
                f"{flag('--force')} starts anew"
            )
        for name, part in stateful.items():
            part.load_state_dict(state[name])
        for one, value in zip(rngs, state["rngs"]):
            one.set_state(value)
        for name, value in state["sums"].items():
            sums[name].copy_(value)
        step, seconds = state["step"], state["seconds"]
        for _ in range(step):  # the draws of the batches before
            next(picks)
    averaged = float_tensors(averages.values())
    latest = float_tensors(networks[name] for name in averages)
    average = averages["generator"].eval()

    def one_step(x: Tensor, x_in: Tensor, mask: Tensor, noise: Tensor) -> None:
        # x: clean images. x_in: the same images, the first n_corrupted of them corrupted. mask:
        # where. noise (B, latent_dim), in standard deviations: for the comparator. A CUDA graph may
        # record this function: no random numbers, no .item(), tensors change in place.
        # One forward pass serves both updates, so each uses the other's weights as they were before
        # the step, as in the released code. BatchNorm statistics are updated once a step
        with torch.autocast(device.type, amp, enabled=amp is not None):
            z, x_hat, z_hat = generator(x_in)
            real, f = discriminator(x)
            fake, f_hat = discriminator(x_hat)

        # D step: its gradient, which stops at D's weights
        loss_d = losses.discriminator(real, fake)
        optimizer_d.zero_grad()
        scaler.scale(loss_d).backward(inputs=weights_d, retain_graph=True)

        # G step: its gradient, which passes through D but does not change it
        terms = {  # name: weight, loss
            "adversarial": (config.w_adv, losses.adversarial(f.detach(), f_hat)),
            "contextual": (config.w_con, losses.contextual(x, x_hat)),
            "encoder": (config.w_enc, losses.encoder(z[n_corrupted:], z_hat[n_corrupted:])),
        }
        loss_g = sum(weight * loss for weight, loss in terms.values())
        optimizer_g.zero_grad()
        scaler.scale(loss_g).backward(inputs=weights_g)

        # Both optimisers move only now: the gradient of loss_g needs D's weights unchanged
        scaler.step(optimizer_d)
        scaler.step(optimizer_g)

        # Comparator's step: where are images corrupted? Its gradient does not reach the generator.
        # New images are reconstructed worse than training images. Noise on the code of a training
        # image has the same effect
        loss_c = torch.zeros_like(loss_d)
        if comparator is not None:
            with torch.autocast(device.type, amp, enabled=amp is not None):
                y_hat = x_hat.detach()
                if config.comparator_noise:
                    with torch.no_grad():  # by the running average, as in scoring
                        code = average.encoder1(x_in)
                        y_hat = average.decoder(code + noise * code.std(0))
                logits = comparator(x_in, y_hat)
            loss_c = losses.comparator(logits, mask)
            optimizer_c.zero_grad()
            scaler.scale(loss_c).backward()
            scaler.step(optimizer_c)
        scaler.update()

        logged = {"discriminator": loss_d, **{name: loss for name, (_, loss) in terms.items()}}
        logged |= {"generator": loss_g, "comparator": loss_c}
        for name, loss in logged.items():
            sums[name].add_(loss.detach())  # in place, as a CUDA graph needs it

    # On a GPU the step is recorded once and then replayed
    update = one_step
    if replay.worth_recording(config.steps - step, device):
        update = replay.Replayed(
            one_step,
            lambda: [sums, vars(scaler), *(part.state_dict() for part in learning.values())],
            device,
        )

    start = time.perf_counter()
    while step < config.steps:
        x = to_input(images[next(picks).to(device, non_blocking=True)], device, scale)
        x_in, mask = x, torch.zeros_like(x[:, 0])
        if n_corrupted:
            corrupted, mask = corruption(x[:n_corrupted])
            x_in = torch.cat([corrupted, x[n_corrupted:]])
            mask = F.pad(mask, (0, 0, 0, 0, 0, len(x) - n_corrupted))
        noise = x[:0]
        if config.comparator_noise:
            # The strength differs from image to image. Its mean is comparator_noise
            strength = 2 * config.comparator_noise * torch.rand(len(x), 1, generator=rng_c)
            noise = strength * torch.randn(len(x), config.latent_dim, generator=rng_c)
        update(x, x_in, mask, noise.to(device, non_blocking=True))

        # Running average. Its decay starts small. With a constant decay, the average of a short run
        # would be mostly the initial weights
        step += 1
        decay = min(config.ema_decay, step / (step + 10))
        torch._foreach_lerp_(averaged, latest, 1 - decay)  # decay averaged + (1 - decay) latest

        # Log; stop where a number is not finite
        log = step % LOG_EVERY == 0
        save = step % config.checkpoint_every == 0 or step == config.steps
        if log or save:
            since = (step - 1) % LOG_EVERY + 1
            means = dict(zip(sums, (torch.stack([*sums.values()]) / since).tolist()))
            finite = all(map(math.isfinite, means.values()))
            if save:
                weights = float_tensors(networks.values())
                finite &= bool(torch.stack([w.isfinite().all() for w in weights]).all())
            if not finite:
                text = ", ".join(f"{name} {mean:g}" for name, mean in means.items())
                raise UserError(
                    f"a loss or weight is not finite at step {step} (losses: {text}): lower --lr "
                    "or take --amp fp32; the last checkpoint is kept"
                )
            elapsed = seconds + time.perf_counter() - start
            speed = step * config.batch_size / elapsed
        if log:
            recorder.log({"step": step, **means, "images_per_second": speed})
            torch._foreach_zero_([*sums.values()])
        recorder.progress.update()

        # Checkpoint. The preview comes first: after a kill between the two it is made again
        if save:
            recorder.preview(step, {**networks, **averages}, scale)
            state = {name: part.state_dict() for name, part in stateful.items()}
            state |= {"device": device.type, "images": fingerprint, "sums": dict(sums)}
            state["rngs"] = [one.get_state() for one in rngs]
            recorder.save({**state, "step": step, "seconds": elapsed})
            seconds, start = elapsed, time.perf_counter()

    return Trained({**networks, **averages}, scale, seconds)


def float_tensors(networks: Iterable[nn.Module]) -> list[Tensor]:
    """Every parameter and BatchNorm statistic of the networks, detached."""
    values = [value for network in networks for value in network.state_dict().values()]
    return [value for value in values if value.is_floating_point()]


def resolve_amp(amp: str, device: torch.device) -> str:
    """Replaces auto: bf16 where the device has it, else fp16 on CUDA and fp32 on a CPU."""
    if amp != "auto":
        return amp
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    has = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16" if has else "fp32"

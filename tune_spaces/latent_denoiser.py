"""The network that denoises DDMI's latents, and its learning rate: a space with conditions."""

from ray import tune

SPACE = {
    "prior.denoiser.kind": tune.choice(["mlp", "unet"]),
    "prior.denoiser.width": tune.choice([256, 544]),
    "prior.denoiser.channels": tune.choice([64, 128]),
    "prior.denoiser.multipliers": tune.choice([(1, 2), (1, 2, 2)]),
    "prior_training.optim.lr": tune.loguniform(5e-4, 5e-3),
}
ONLY_IF = {
    "prior.denoiser.width": {"prior.denoiser.kind": "mlp"},
    "prior.denoiser.channels": {"prior.denoiser.kind": "unet"},
    "prior.denoiser.multipliers": {"prior.denoiser.kind": "unet"},
}

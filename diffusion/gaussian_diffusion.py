"""Gaussian diffusion: DDPM's discrete Markov chain, its training loss, DDPM and DDIM sampling.

The network predicts the noise. The variance is learnt or fixed. A step t is an index into this
(respaced) chain. The network receives timestep_map[t], the step of the training chain.

Shape legend: N batch, C channels, h x w latent size, S steps of the chain, K kept steps
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from tqdm import trange

from diffusion.guidance import check_channels, prediction_and_aux_loss
from diffusion.schedule import noise_schedule_betas, space_timesteps

Model = Callable[..., Tensor | tuple]  # model(x, t, **model_kwargs) -> prediction[, aux_loss]


class GaussianDiffusion:
    """Diffusion chain of S steps.

    betas: (S,) float64 in (0, 1); the tables computed from them are float64 too
    timestep_map: the S steps as the network receives them
    learn_sigma: True: the network has C additional channels, which interpolate the variance between
        the posterior variance and beta. False: the variance is beta. None: either, depending on the
        number of channels that the network returns
    """

    def __init__(
        self, betas: Tensor, timestep_map: Sequence[int], *, learn_sigma: bool | None = True
    ):
        self.num_timesteps = len(betas)
        self.timestep_map = torch.tensor(timestep_map)
        self.learn_sigma = learn_sigma
        self._on_device: dict[tuple[str, torch.device], Tensor] = {}

        self.betas = betas
        self.alphas_cumprod = (1 - betas).cumprod(0)
        self.alphas_cumprod_prev = torch.cat([betas.new_ones(1), self.alphas_cumprod[:-1]])
        noise_variance = 1 - self.alphas_cumprod
        self.sqrt_alphas_cumprod = self.alphas_cumprod.sqrt()
        self.sqrt_one_minus_alphas_cumprod = noise_variance.sqrt()
        self.sqrt_recip_alphas_cumprod = self.alphas_cumprod.rsqrt()
        self.sqrt_recipm1_alphas_cumprod = (1 / self.alphas_cumprod - 1).sqrt()

        # q(x_{t-1} | x_t, x_0): Ho et al. 2020, equations 6 and 7
        noise_variance_prev = 1 - self.alphas_cumprod_prev
        self.posterior_mean_coef1 = betas * self.alphas_cumprod_prev.sqrt() / noise_variance
        self.posterior_mean_coef2 = noise_variance_prev * (1 - betas).sqrt() / noise_variance
        self.posterior_variance = betas * noise_variance_prev / noise_variance

        # The posterior variance at t = 0 is 0. Use the value at t = 1 where a log is taken.
        first = self.posterior_variance[1:2] if len(betas) > 1 else betas
        self.posterior_log_variance_clipped = torch.cat([first, self.posterior_variance[1:]]).log()
        self.log_betas = betas.log()
        # beta, but at t = 0 the posterior variance at t = 1, as in the published code.
        self.fixed_log_variance = torch.cat([first, betas[1:]]).log()

    def respaced(self, timesteps: Sequence[int]) -> "GaussianDiffusion":
        """Returns the chain that keeps only K steps of this chain, given in increasing order.

        `alphas_cumprod` at the kept steps stays the same. Nichol and Dhariwal 2021, equation 19.
        """
        steps = list(timesteps)
        kept = self.alphas_cumprod[steps]                      # (K,)
        previous = torch.cat([kept.new_ones(1), kept[:-1]])    # (K,)
        timestep_map = self.timestep_map[steps].tolist()
        return GaussianDiffusion(1 - kept / previous, timestep_map, learn_sigma=self.learn_sigma)

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Returns x_t (N, C, h, w) from x_start and noise (N, C, h, w) and t (N,), int64.

        Ho et al. 2020, equation 4.
        """
        signal = self.at("sqrt_alphas_cumprod", t) * x_start
        return signal + self.at("sqrt_one_minus_alphas_cumprod", t) * noise

    def training_losses(
        self, model: Model, x: Tensor, t: Tensor, model_kwargs: dict | None = None,
        noise: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Returns the terms of the hybrid loss of each image, and the auxiliary loss.

        model: called as model(x_t, timestep_map[t], **model_kwargs)
        x: (N, C, h, w) data
        t: (N,) int64 in [0, S)
        noise: (N, C, h, w); drawn if None

        Returns, in fp32:
            mse         (N,) mean squared error of the predicted noise
            vb          (N,) term of the variational bound at t, in bits per dimension, which trains
                        only the variance; 0 if the variance is fixed
            loss        (N,) mse + vb
            aux_loss    scalar, the network's auxiliary loss; minimise loss.mean() + aux_loss

        The loss is mse + 0.001 times the bound, which is the sum of S terms (Nichol and Dhariwal
        2021, equation 16). One term at a uniform t, times S, estimates the sum. For S = 1000 the
        two factors cancel, so the term has the weight 1.
        """
        x = x.float()
        noise = torch.randn_like(x) if noise is None else noise.float()
        x_t = self.q_sample(x, t, noise)                   # (N, C, h, w)
        output, aux_loss = self._call(model, x_t, t, model_kwargs)
        mse = (noise - output[:, : x.shape[1]]).square().flatten(1).mean(1)  # (N,)
        vb = torch.zeros_like(mse)
        if output.shape[1] > x.shape[1]:
            vb = self._variational_bound_term(output, x, x_t, t)  # (N,)
        return {"loss": mse + vb, "mse": mse, "vb": vb, "aux_loss": aux_loss}

    def p_mean_variance(
        self, model: Model, x: Tensor, t: Tensor, clip_denoised: bool = True,
        model_kwargs: dict | None = None,
    ) -> dict[str, Tensor]:
        """Returns the parameters of the predicted p(x_{t-1} | x_t) and the estimate of x_0.

        model: called as model(x, timestep_map[t], **model_kwargs)
        x: (N, C, h, w) at step t (N,), int64 in [0, S)
        clip_denoised: clamp the estimate of x_0 to [-1, 1]; for pixels, not for latents

        Returns "mean", "variance", "log_variance" and "pred_xstart", each (N, C, h, w) in fp32.

        Nichol and Dhariwal 2021, equation 15.
        """
        output, _ = self._call(model, x, t, model_kwargs)
        epsilon, fraction = output[:, : x.shape[1]], output[:, x.shape[1] :]
        pred_xstart = self.at("sqrt_recip_alphas_cumprod", t) * x
        pred_xstart = pred_xstart - self.at("sqrt_recipm1_alphas_cumprod", t) * epsilon
        if clip_denoised:
            pred_xstart = pred_xstart.clamp(-1, 1)
        log_variance = self.at("fixed_log_variance", t)   # (N, 1, 1, 1)
        if fraction.shape[1]:
            fraction = (fraction + 1) / 2                  # 0: posterior variance, 1: beta
            smallest = self.at("posterior_log_variance_clipped", t)
            log_variance = fraction * self.at("log_betas", t) + (1 - fraction) * smallest
        log_variance = log_variance.expand_as(x)
        return {
            "mean": self._posterior_mean(pred_xstart, x, t), "variance": log_variance.exp(),
            "log_variance": log_variance, "pred_xstart": pred_xstart,
        }

    def p_sample_loop(
        self, model: Model, shape: Sequence[int], noise: Tensor | None = None, **options
    ) -> Tensor:
        """Returns a sample x_0 (N, C, h, w), fp32, by ancestral sampling.

        shape: (N, C, h, w)
        noise: initial state; if None, noise_fn draws it on `device`

        Options, by keyword:
        clip_denoised (True), model_kwargs (None): see `p_mean_variance`
        device (None): device on which to sample; None: the device of `noise`
        callback (None): called after each step with a dict: "step" (from 0), "t" (N,) as the
            network receives it, "x" (state after the step) and "pred_xstart"
        noise_fn (torch.randn_like): x -> noise like x, called once per step; see `PerImageNoise`
        progress (False): show a progress bar

        Ho et al. 2020, algorithm 2.
        """

        def step(x: Tensor, t: Tensor, p: dict[str, Tensor], noise_fn: Callable) -> Tensor:
            is_last = (t == 0)[:, None, None, None]        # the last step draws, but adds no noise
            return p["mean"] + ~is_last * (0.5 * p["log_variance"]).exp() * noise_fn(x)

        return self._sample_loop(step, model, shape, noise, **options)

    def ddim_sample_loop(
        self, model: Model, shape: Sequence[int], noise: Tensor | None = None, *,
        eta: float = 0.0, **options,
    ) -> Tensor:
        """Returns a sample x_0 (N, C, h, w), fp32, by DDIM; arguments as for `p_sample_loop`.

        eta: in [0, 1], standard deviation of the noise added per step, relative to the posterior's
            standard deviation; at 0 the sampler is deterministic and the steps draw no noise

        Song et al. 2021, equations 12 and 16.
        """

        def step(x: Tensor, t: Tensor, p: dict[str, Tensor], noise_fn: Callable) -> Tensor:
            epsilon = self.at("sqrt_recip_alphas_cumprod", t) * x - p["pred_xstart"]
            epsilon = epsilon / self.at("sqrt_recipm1_alphas_cumprod", t)  # (N, C, h, w)
            alpha_prev = self.at("alphas_cumprod_prev", t)  # (N, 1, 1, 1)
            new_variance = eta**2 * self.at("posterior_variance", t)
            kept_variance = (1 - alpha_prev - new_variance).clamp(min=0)
            x = alpha_prev.sqrt() * p["pred_xstart"] + kept_variance.sqrt() * epsilon
            return x + new_variance.sqrt() * noise_fn(x) if eta > 0 else x

        return self._sample_loop(step, model, shape, noise, **options)

    @torch.no_grad()
    def _sample_loop(
        self, take_step: Callable[..., Tensor], model: Model, shape: Sequence[int],
        noise: Tensor | None, *, clip_denoised: bool = True, model_kwargs: dict | None = None,
        device: torch.device | str | None = None, progress: bool = False,
        callback: Callable[[dict], None] | None = None,
        noise_fn: Callable[[Tensor], Tensor] = torch.randn_like,
    ) -> Tensor:
        """Starts from noise and applies `take_step` at each step of the chain, from S - 1 to 0."""
        if noise is None:
            noise = noise_fn(torch.empty(tuple(shape), device=device))
        x = noise.to(device=device, dtype=torch.float32)   # (N, C, h, w)
        for step in trange(self.num_timesteps, disable=not progress, leave=False):
            t = torch.full((len(x),), self.num_timesteps - 1 - step, device=x.device)  # (N,)
            p = self.p_mean_variance(model, x, t, clip_denoised, model_kwargs)
            x = take_step(x, t, p, noise_fn)
            if callback is not None:
                model_time = self._moved("timestep_map", x.device)[t]
                callback({"step": step, "t": model_time, "x": x, "pred_xstart": p["pred_xstart"]})
        return x

    def _call(
        self, model: Model, x: Tensor, t: Tensor, model_kwargs: dict | None
    ) -> tuple[Tensor, Tensor]:
        """Returns the network's output (N, C or 2C, h, w) in fp32, and the auxiliary loss."""
        model_time = self._moved("timestep_map", t.device)[t]  # (N,)
        output, aux_loss = prediction_and_aux_loss(model(x, model_time, **(model_kwargs or {})))
        check_channels(output, x, {True: (2,), False: (1,), None: (1, 2)}[self.learn_sigma])
        return output, aux_loss

    def _posterior_mean(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Returns the mean of q(x_{t-1} | x_t, x_0); Ho et al. 2020, equation 7."""
        mean = self.at("posterior_mean_coef1", t) * x_start
        return mean + self.at("posterior_mean_coef2", t) * x_t

    def _variational_bound_term(
        self, output: Tensor, x_start: Tensor, x_t: Tensor, t: Tensor
    ) -> Tensor:
        """Returns the term L_t of the variational bound (N,), in bits per dimension.

        L_t is the KL divergence from the posterior for t > 0, and the decoder's negative
        log-likelihood for t = 0 (Ho et al. 2020, equation 5). The mean gets no gradient.
        """
        prediction, fraction = output.chunk(2, dim=1)      # (N, C, h, w) each
        frozen = torch.cat([prediction.detach(), fraction], dim=1)
        p = self.p_mean_variance(lambda *_: frozen, x_t, t, clip_denoised=False)
        mean = self._posterior_mean(x_start, x_t, t)
        log_variance = self.at("posterior_log_variance_clipped", t)
        log_ratio = log_variance - p["log_variance"]
        distance = (mean - p["mean"]).square() / p["variance"]
        kl = 0.5 * (log_ratio.exp() + distance - 1 - log_ratio)
        nll = -_discretized_log_likelihood(x_start, p["mean"], 0.5 * p["log_variance"])
        nats = torch.where(t == 0, nll.flatten(1).mean(1), kl.flatten(1).mean(1))  # (N,)
        return nats / math.log(2)

    def at(self, name: str, t: Tensor) -> Tensor:
        """Returns the entries of table `name` at steps t (N,) as fp32 (N, 1, 1, 1)."""
        return self._moved(name, t.device)[t][:, None, None, None]

    def _moved(self, name: str, device: torch.device) -> Tensor:
        """Returns the table `name`, rounded to fp32, on `device`; copies each table there once."""
        if (name, device) not in self._on_device:
            table = getattr(self, name)
            table = table.float() if table.is_floating_point() else table
            self._on_device[name, device] = table.to(device)
        return self._on_device[name, device]


def create_diffusion(
    timestep_respacing: str | int | None = "", noise_schedule: str = "linear", *,
    learn_sigma: bool | None = True, diffusion_steps: int = 1000,
) -> GaussianDiffusion:
    """Returns the diffusion chain for training a DiT, or a shorter chain for sampling.

    timestep_respacing: "" for the complete chain (training), else see `space_timesteps`
    noise_schedule: "linear" or "squaredcos_cap_v2"
    learn_sigma: see `GaussianDiffusion`
    diffusion_steps: length of the chain before respacing
    """
    betas = noise_schedule_betas(noise_schedule, diffusion_steps)
    chain = GaussianDiffusion(betas, range(diffusion_steps), learn_sigma=learn_sigma)
    return chain.respaced(space_timesteps(diffusion_steps, timestep_respacing))


def _discretized_log_likelihood(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Returns, per element, the log probability of the bin of x, one of 256 bins over [-1, 1].

    The first and the last bin extend to infinity. Ho et al. 2020, equation 13.
    """
    centred, inverse_std = x - mean, (-log_std).exp()
    below_upper = _normal_cdf(inverse_std * (centred + 1 / 255))
    below_lower = _normal_cdf(inverse_std * (centred - 1 / 255))
    mass = torch.where(x < -0.999, below_upper, below_upper - below_lower)
    mass = torch.where(x > 0.999, 1 - below_lower, mass)
    return mass.clamp(min=1e-12).log()


def _normal_cdf(x: Tensor) -> Tensor:
    """Returns the standard normal CDF by the tanh approximation of GELU, which errs by up to 3e-4.

    The published loss uses this approximation; the exact CDF gives different numbers.
    """
    return 0.5 * (1 + (math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)).tanh())

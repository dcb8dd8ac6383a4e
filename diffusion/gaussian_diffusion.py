"""Gaussian diffusion: the discrete chain of DDPM, its training loss, and DDPM and DDIM sampling.

Only what DiT uses: prediction of the noise or of x_0, a learned or a fixed variance, two
schedules. A step t is an index into this (respaced) chain; the network is told timestep_map[t],
the step of the chain that it was trained on.

Shape legend: N batch, C channels, h x w latent size, S steps of the chain
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from tqdm import trange

from diffusion.guidance import prediction_and_aux_loss
from diffusion.respace import respaced_betas, space_timesteps

PREDICTIONS = ("epsilon", "x_start")
VARIANCES = ("learned_range", "fixed_large", "fixed_small")


def noise_schedule_betas(noise_schedule: str, num_timesteps: int) -> Tensor:
    """Returns betas (S,), float64, of the schedule "linear" or "squaredcos_cap_v2".

    linear: from 1e-4 to 0.02 for 1000 steps, scaled so that shorter chains end as noisy
        (Ho et al. 2020, section 4)
    squaredcos_cap_v2: the cosine schedule (Nichol and Dhariwal 2021, equation 17), betas <= 0.999

    Raises ValueError for any other name, and for fewer than one step.
    """
    if num_timesteps < 1:
        raise ValueError(f"a diffusion chain needs at least 1 step, got {num_timesteps}")
    if noise_schedule == "linear":
        scale = 1000 / num_timesteps
        return torch.linspace(1e-4 * scale, 0.02 * scale, num_timesteps, dtype=torch.float64)
    if noise_schedule == "squaredcos_cap_v2":
        edges = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps  # (S + 1,)
        alphas_cumprod = ((edges + 0.008) / 1.008 * math.pi / 2).cos().square()
        return (1 - alphas_cumprod[1:] / alphas_cumprod[:-1]).clamp(max=0.999)
    raise ValueError(
        f"noise schedule must be 'linear' or 'squaredcos_cap_v2', got {noise_schedule!r}"
    )


class GaussianDiffusion:
    """A diffusion chain of S steps.

    betas: (S,) in (0, 1)
    timestep_map: S steps as the network knows them; None for 0 to S - 1
    prediction: what the network's first C channels are, "epsilon" or "x_start"
    variance: "learned_range" (the network has C further channels, which interpolate between the
        two fixed ones), "fixed_large" (beta) or "fixed_small" (of the posterior)

    The tables are attributes of this object (betas, alphas_cumprod, posterior_variance, ...), (S,)
    float64 on the CPU; timestep_map is (S,) int64, num_timesteps is S.

    A network is called as model(x, t, **model_kwargs) and returns a tensor or (tensor, aux_loss).
    Raises ValueError for arguments outside these ranges.
    """

    def __init__(
        self,
        betas: Tensor,
        *,
        timestep_map: Sequence[int] | None = None,
        prediction: str = "epsilon",
        variance: str = "learned_range",
    ):
        betas = torch.as_tensor(betas, dtype=torch.float64)
        if betas.ndim != 1 or len(betas) == 0 or not ((betas > 0) & (betas < 1)).all():
            raise ValueError(
                f"betas must be a list of values in (0, 1), got shape {tuple(betas.shape)}"
                + (f", {betas.min():.3g} to {betas.max():.3g}" if betas.numel() else "")
            )
        if prediction not in PREDICTIONS:
            raise ValueError(f"prediction must be one of {PREDICTIONS}, got {prediction!r}")
        if variance not in VARIANCES:
            raise ValueError(f"variance must be one of {VARIANCES}, got {variance!r}")
        self.num_timesteps = len(betas)
        self.timestep_map = torch.tensor(
            list(range(len(betas)) if timestep_map is None else timestep_map)
        )
        if len(self.timestep_map) != len(betas):
            raise ValueError(
                f"timestep_map must have one entry per beta, got {len(self.timestep_map)}, "
                f"expected {len(betas)}"
            )
        self.prediction = prediction
        self.variance = variance
        self._set_tables(betas)
        self._on_device: dict[tuple[str, torch.device], Tensor] = {}

    def _set_tables(self, betas: Tensor) -> None:
        """Computes every table of the chain from its betas (S,)."""
        self.betas = betas
        self.alphas_cumprod = (1 - betas).cumprod(0)
        self.alphas_cumprod_prev = torch.cat([betas.new_ones(1), self.alphas_cumprod[:-1]])
        noise_share = 1 - self.alphas_cumprod
        self.sqrt_alphas_cumprod = self.alphas_cumprod.sqrt()
        self.sqrt_one_minus_alphas_cumprod = noise_share.sqrt()
        self.sqrt_recip_alphas_cumprod = self.alphas_cumprod.rsqrt()
        self.sqrt_recipm1_alphas_cumprod = (1 / self.alphas_cumprod - 1).sqrt()

        # q(x_{t-1} | x_t, x_0): Ho et al. 2020, equations 6 and 7
        noise_share_prev = 1 - self.alphas_cumprod_prev
        self.posterior_mean_coef1 = betas * self.alphas_cumprod_prev.sqrt() / noise_share
        self.posterior_mean_coef2 = noise_share_prev * (1 - betas).sqrt() / noise_share
        self.posterior_variance = betas * noise_share_prev / noise_share

        # The posterior at t = 0 has variance 0; its neighbour's stands in where a log is taken.
        first = self.posterior_variance[1:2] if len(betas) > 1 else betas
        self.fixed_large_variance = torch.cat([first, betas[1:]])
        self.log_betas = betas.log()
        self.fixed_large_log_variance = self.fixed_large_variance.log()
        self.posterior_log_variance_clipped = torch.cat([first, self.posterior_variance[1:]]).log()

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Returns x_t (N, C, h, w) from x_start and noise (N, C, h, w) and t (N,), int64.

        Ho et al. 2020, equation 4.
        """
        signal = self._at("sqrt_alphas_cumprod", t) * x_start
        return signal + self._at("sqrt_one_minus_alphas_cumprod", t) * noise

    def training_losses(
        self,
        model: Callable[..., Tensor | tuple],
        x: Tensor,
        t: Tensor,
        model_kwargs: dict | None = None,
        noise: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Returns the terms of the hybrid loss of each image, and the network's own aux loss.

        x: (N, C, h, w) data; t: (N,) int64 in [0, S); noise: (N, C, h, w), drawn when None

        Returns fp32 "mse" (N,), the squared error of the prediction; "vb" (N,), the variational
        bound's term at t in bits per dimension, which trains the variance alone (0 with a fixed
        one); "loss" (N,), their sum; and "aux_loss", a scalar that is not part of it: minimise
        loss.mean() + aux_loss. Raises ValueError for the wrong number of predicted channels.

        Nichol and Dhariwal 2021, equation 16: the bound has S terms, so one term at a uniform t
        has their weight of 0.001 when S = 1000.
        """
        x = x.float()
        noise = torch.randn_like(x) if noise is None else noise.float()
        x_t = self.q_sample(x, t, noise)                   # (N, C, h, w)
        output, aux_loss = self._call(model, x_t, t, model_kwargs)
        target = x if self.prediction == "x_start" else noise
        mse = (target - output[:, : x.shape[1]]).square().flatten(1).mean(1)  # (N,)
        vb = torch.zeros_like(mse)
        if self.variance == "learned_range":
            vb = self._variational_bound_term(output, x, x_t, t)  # (N,)
        return {"loss": mse + vb, "mse": mse, "vb": vb, "aux_loss": aux_loss}

    @torch.no_grad()
    def bits_per_dimension(
        self,
        model: Callable[..., Tensor | tuple],
        x: Tensor,
        model_kwargs: dict | None = None,
        noise_fn: Callable[[Tensor], Tensor] = torch.randn_like,
        progress: bool = False,
    ) -> dict[str, Tensor]:
        """Returns the variational bound on -log2 p(x) per dimension, and its parts; fp32.

        x: (N, C, h, w) data, taken as rounded to bins of 2/255, of which there are as many as x
            needs (pixels in [-1, 1] have 256); noise_fn: x -> noise like x, called once a step

        Returns "total" (N,), "prior" (N,) and "vb" (N, S): the KL divergences of steps 1 to S - 1,
        and at step 0 the code length of the bin. total = prior + vb.sum(1). All S steps are
        evaluated. Ho et al. 2020, equation 5; Nichol and Dhariwal 2021, equations 4 to 7.
        """
        x, terms = x.float(), []
        for step in trange(self.num_timesteps, disable=not progress, leave=False):
            t = torch.full((len(x),), step, device=x.device)  # (N,)
            x_t = self.q_sample(x, t, noise_fn(x))         # (N, C, h, w)
            p = self.p_mean_variance(
                model, x_t, t, clip_denoised=False, model_kwargs=model_kwargs
            )
            if step == 0:
                nats = -_bin_log_likelihood(x, p["mean"], 0.5 * p["log_variance"])
            else:
                mean = self._posterior_mean(x, x_t, t)
                log_variance = self._at("posterior_log_variance_clipped", t)
                nats = _gaussian_kl(mean, log_variance, p["mean"], p["log_variance"])
            terms.append(nats.flatten(1).mean(1) / math.log(2))  # (N,)
        t = torch.full((len(x),), self.num_timesteps - 1, device=x.device)
        noise_share = (1 - self._at("alphas_cumprod", t)).log()
        zero = torch.zeros((), device=x.device)
        prior = _gaussian_kl(self._at("sqrt_alphas_cumprod", t) * x, noise_share, zero, zero)
        prior = prior.flatten(1).mean(1) / math.log(2)     # (N,)
        vb = torch.stack(terms, dim=1)                     # (N, S)
        return {"total": prior + vb.sum(1), "prior": prior, "vb": vb}

    def p_mean_variance(
        self,
        model: Callable[..., Tensor | tuple],
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        model_kwargs: dict | None = None,
    ) -> dict[str, Tensor]:
        """Returns the network's p(x_{t-1} | x_t) and its estimate of x_0, each (N, C, h, w), fp32.

        x: (N, C, h, w) at step t (N,), int64 in [0, S)
        clip_denoised: clamp the estimate of x_0 to [-1, 1]; for pixels, not for latents

        Returns "mean", "variance", "log_variance" and "pred_xstart". Raises ValueError for the
        wrong number of predicted channels. Nichol and Dhariwal 2021, equation 15.
        """
        output, _ = self._call(model, x, t, model_kwargs)
        return self._p_mean_variance(output, x, t, clip_denoised=clip_denoised)

    def p_sample_loop(
        self,
        model: Callable[..., Tensor | tuple],
        shape: Sequence[int],
        noise: Tensor | None = None,
        *,
        clip_denoised: bool = True,
        model_kwargs: dict | None = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        callback: Callable[[dict], None] | None = None,
        noise_fn: Callable[[Tensor], Tensor] = torch.randn_like,
    ) -> Tensor:
        """Returns a sample x_0 (N, C, h, w), fp32, by ancestral sampling.

        shape: (N, C, h, w); noise: the first state, drawn by noise_fn on `device` when None
        clip_denoised, model_kwargs: see `p_mean_variance`
        callback: called after each step with "step" from 0, "t" (N,) as given to the network, "x"
            the state after the step, "pred_xstart"
        noise_fn: x -> noise like x, called once a step; see `PerImageNoise`
        progress: show a bar

        Ho et al. 2020, algorithm 2.
        """
        return self._sample_loop(
            self._ddpm_step,
            model,
            self._first_state(shape, noise, device, noise_fn),
            clip_denoised=clip_denoised,
            model_kwargs=model_kwargs,
            progress=progress,
            callback=callback,
            noise_fn=noise_fn,
        )

    def ddim_sample_loop(
        self,
        model: Callable[..., Tensor | tuple],
        shape: Sequence[int],
        noise: Tensor | None = None,
        *,
        clip_denoised: bool = True,
        model_kwargs: dict | None = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        callback: Callable[[dict], None] | None = None,
        noise_fn: Callable[[Tensor], Tensor] = torch.randn_like,
        eta: float = 0.0,
    ) -> Tensor:
        """Returns a sample x_0 (N, C, h, w), fp32, by DDIM; arguments as for `p_sample_loop`.

        eta: share of the posterior's standard deviation that is drawn anew each step, in [0, 1];
            at 0 the sampler is deterministic and noise_fn is not called for a step

        Raises ValueError for another eta. Song et al. 2021, equations 12 and 16.
        """
        if not 0 <= eta <= 1:
            raise ValueError(f"eta must be in [0, 1], got {eta}")
        return self._sample_loop(
            partial(self._ddim_step, eta=eta),
            model,
            self._first_state(shape, noise, device, noise_fn),
            clip_denoised=clip_denoised,
            model_kwargs=model_kwargs,
            progress=progress,
            callback=callback,
            noise_fn=noise_fn,
        )

    @torch.no_grad()
    def _sample_loop(
        self,
        take_step: Callable[..., Tensor],
        model: Callable[..., Tensor | tuple],
        x: Tensor,
        *,
        clip_denoised: bool,
        model_kwargs: dict | None,
        progress: bool,
        callback: Callable[[dict], None] | None,
        noise_fn: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """Walks x (N, C, h, w) from the last step of the chain to the first with `take_step`."""
        for step in trange(self.num_timesteps, disable=not progress, leave=False):
            t = torch.full((len(x),), self.num_timesteps - 1 - step, device=x.device)  # (N,)
            p = self.p_mean_variance(
                model, x, t, clip_denoised=clip_denoised, model_kwargs=model_kwargs
            )
            x = take_step(x, t, p, noise_fn=noise_fn)
            if callback is not None:
                model_time = self._moved("timestep_map", x.device)[t]
                callback({"step": step, "t": model_time, "x": x, "pred_xstart": p["pred_xstart"]})
        return x

    def _ddpm_step(
        self,
        x: Tensor,
        t: Tensor,
        p: dict[str, Tensor],
        *,
        noise_fn: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """Draws x_{t-1} from p, what `p_mean_variance` says of x (N, C, h, w) at t (N,)."""
        not_last = (t > 0)[:, None, None, None]            # the last step draws noise, adds none
        return p["mean"] + not_last * (0.5 * p["log_variance"]).exp() * noise_fn(x)

    def _ddim_step(
        self,
        x: Tensor,
        t: Tensor,
        p: dict[str, Tensor],
        *,
        noise_fn: Callable[[Tensor], Tensor],
        eta: float,
    ) -> Tensor:
        """Returns x_{t-1} on the way from x (N, C, h, w) at t (N,) through p's estimate of x_0."""
        epsilon = self._at("sqrt_recip_alphas_cumprod", t) * x - p["pred_xstart"]
        epsilon = epsilon / self._at("sqrt_recipm1_alphas_cumprod", t)  # (N, C, h, w)
        alpha_prev = self._at("alphas_cumprod_prev", t)    # (N, 1, 1, 1)
        fresh = eta**2 * self._at("posterior_variance", t)
        kept = (1 - alpha_prev - fresh).clamp(min=0)
        x = alpha_prev.sqrt() * p["pred_xstart"] + kept.sqrt() * epsilon
        return x + fresh.sqrt() * noise_fn(x) if eta > 0 else x

    def _first_state(
        self,
        shape: Sequence[int],
        noise: Tensor | None,
        device: torch.device | str | None,
        noise_fn: Callable[[Tensor], Tensor],
    ) -> Tensor:
        if noise is None:
            return noise_fn(torch.empty(tuple(shape), dtype=torch.float32, device=device))
        if tuple(noise.shape) != tuple(shape):
            raise ValueError(f"noise must have shape {tuple(shape)}, got {tuple(noise.shape)}")
        return noise.to(device=device, dtype=torch.float32)

    def _call(
        self,
        model: Callable[..., Tensor | tuple],
        x: Tensor,
        t: Tensor,
        model_kwargs: dict | None,
    ) -> tuple[Tensor, Tensor]:
        """Returns the network's output (N, C or 2C, h, w) in fp32, and its aux loss."""
        model_time = self._moved("timestep_map", t.device)[t]  # (N,)
        output = model(x, model_time, **(model_kwargs or {}))
        output, aux_loss = prediction_and_aux_loss(output)
        expected = (2 if self.variance == "learned_range" else 1) * x.shape[1]
        if output.shape[1] != expected:
            raise ValueError(
                f"the network must predict {expected} channels with variance {self.variance!r}, "
                f"got {output.shape[1]}"
            )
        return output, aux_loss

    def _p_mean_variance(
        self, output: Tensor, x: Tensor, t: Tensor, *, clip_denoised: bool
    ) -> dict[str, Tensor]:
        """Reads a network's output (N, C or 2C, h, w) as the distribution of x_{t-1}."""
        prediction = output[:, : x.shape[1]]
        if self.prediction == "epsilon":
            prediction = (
                self._at("sqrt_recip_alphas_cumprod", t) * x
                - self._at("sqrt_recipm1_alphas_cumprod", t) * prediction
            )
        pred_xstart = prediction.clamp(-1, 1) if clip_denoised else prediction
        variance, log_variance = self._p_variance(output[:, x.shape[1] :], t)
        return {
            "mean": self._posterior_mean(pred_xstart, x, t),
            "variance": variance.expand_as(x),
            "log_variance": log_variance.expand_as(x),
            "pred_xstart": pred_xstart,
        }

    def _p_variance(self, share: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Returns variance and log variance; `share` (N, C, h, w) is in [-1, 1] when learned."""
        if self.variance == "fixed_large":
            return self._at("fixed_large_variance", t), self._at("fixed_large_log_variance", t)
        smallest = self._at("posterior_log_variance_clipped", t)
        if self.variance == "fixed_small":
            return self._at("posterior_variance", t), smallest
        largest = self._at("log_betas", t)
        share = (share + 1) / 2                            # 0 smallest, 1 largest
        log_variance = share * largest + (1 - share) * smallest
        return log_variance.exp(), log_variance

    def _posterior_mean(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Returns the mean of q(x_{t-1} | x_t, x_0); Ho et al. 2020, equation 7."""
        mean = self._at("posterior_mean_coef1", t) * x_start
        return mean + self._at("posterior_mean_coef2", t) * x_t

    def _variational_bound_term(
        self, output: Tensor, x_start: Tensor, x_t: Tensor, t: Tensor
    ) -> Tensor:
        """Returns L_t of the bound, (N,), in bits per dimension, with no gradient to the mean.

        The KL divergence from the posterior for t > 0, and the decoder's negative log-likelihood
        for t = 0; Ho et al. 2020, equation 5.
        """
        prediction, share = output.chunk(2, dim=1)         # (N, C, h, w) each
        frozen = torch.cat([prediction.detach(), share], dim=1)
        p = self._p_mean_variance(frozen, x_t, t, clip_denoised=False)
        kl = _gaussian_kl(
            self._posterior_mean(x_start, x_t, t),
            self._at("posterior_log_variance_clipped", t),
            p["mean"],
            p["log_variance"],
        )
        nll = -_discretized_log_likelihood(x_start, p["mean"], 0.5 * p["log_variance"])
        nats = torch.where(t == 0, nll.flatten(1).mean(1), kl.flatten(1).mean(1))  # (N,)
        return nats / math.log(2)

    def _at(self, name: str, t: Tensor) -> Tensor:
        """Returns the table's entries at steps t (N,) as fp32 (N, 1, 1, 1)."""
        return self._moved(name, t.device)[t][:, None, None, None]

    def _moved(self, name: str, device: torch.device) -> Tensor:
        """Returns the table `name` on `device`, rounded to fp32; each is copied there once."""
        if (name, device) not in self._on_device:
            table = getattr(self, name)
            table = table.float() if table.is_floating_point() else table
            self._on_device[name, device] = table.to(device)
        return self._on_device[name, device]


def create_diffusion(
    timestep_respacing: str | int | None = "",
    noise_schedule: str = "linear",
    predict_xstart: bool = False,
    learn_sigma: bool = True,
    sigma_small: bool = False,
    diffusion_steps: int = 1000,
) -> GaussianDiffusion:
    """Returns the diffusion chain that a DiT trains on, or a shorter one to sample with.

    timestep_respacing: "" for the whole chain (training), else see `space_timesteps`
    noise_schedule: "linear" or "squaredcos_cap_v2"
    predict_xstart: the network predicts x at t = 0 instead of the noise
    learn_sigma: the network has 2C output channels, the second C of which choose the variance
    sigma_small: without learn_sigma, the posterior variance instead of beta
    diffusion_steps: length of the chain before respacing

    Raises ValueError for an unknown schedule or a respacing that the chain does not allow.
    """
    timesteps = space_timesteps(diffusion_steps, timestep_respacing)
    betas = respaced_betas(noise_schedule_betas(noise_schedule, diffusion_steps), timesteps)
    fixed_variance = "fixed_small" if sigma_small else "fixed_large"
    return GaussianDiffusion(
        betas,
        timestep_map=timesteps,
        prediction="x_start" if predict_xstart else "epsilon",
        variance="learned_range" if learn_sigma else fixed_variance,
    )


def _gaussian_kl(mean_q: Tensor, log_var_q: Tensor, mean_p: Tensor, log_var_p: Tensor) -> Tensor:
    """Returns KL(q || p) of diagonal Gaussians, per element, in nats."""
    spread = (log_var_q - log_var_p).exp() + (mean_q - mean_p).square() * (-log_var_p).exp()
    return 0.5 * (log_var_p - log_var_q + spread - 1)


def _discretized_log_likelihood(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Returns the log mass, per element, that a Gaussian puts on x's bin of 256 over [-1, 1].

    The bins at both ends are open. Ho et al. 2020, equation 13.
    """
    centred, inverse_std = x - mean, (-log_std).exp()
    below_upper = _normal_cdf(inverse_std * (centred + 1 / 255))
    below_lower = _normal_cdf(inverse_std * (centred - 1 / 255))
    mass = torch.where(x < -0.999, below_upper, below_upper - below_lower)
    mass = torch.where(x > 0.999, 1 - below_lower, mass)
    return mass.clamp(min=1e-12).log()


def _bin_log_likelihood(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Returns the log mass, per element, of the bin of width 2/255 around x; no bin is open.

    Unlike the published decoder's, whose end bins at -1 and 1 reach to infinity, these bins are a
    code for latents too, which lie beyond.
    """
    centred, inverse_std = (x - mean).abs(), (-log_std).exp()
    # on the side of the tail, where differences of the distribution function keep their digits
    nearer = torch.special.log_ndtr(-inverse_std * (centred - 1 / 255))
    farther = torch.special.log_ndtr(-inverse_std * (centred + 1 / 255))
    return nearer + torch.log(-torch.expm1((farther - nearer).clamp(max=-1e-7)))


def _normal_cdf(x: Tensor) -> Tensor:
    """Returns the normal distribution function to 3e-4, by the tanh form that GELU uses too.

    The published loss has this form; the exact function would give other numbers.
    """
    return 0.5 * (1 + (math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)).tanh())

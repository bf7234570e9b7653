"""Ordinary runs of the stock samplers, called and not copied, so that a candidate's clip is that of the stock node."""

from dataclasses import dataclass, replace

import comfy.model_management
import comfy.samplers
import torch

import nodes as comfyui_nodes

from ..kernels.prism.plan import PlanError
from . import step_cache
from .race import ForwardCounter, copy_guider


def sampler_nodes():
    """ComfyUI's module of the custom sampler nodes, imported on first use: it is not loaded yet when this pack is."""
    from comfy_extras import nodes_custom_sampler

    return nodes_custom_sampler


class CandidateNoises:
    """A NOISE that draws the noise of every candidate for the latent that a stock sampler has prepared.

    sources: a NOISE with a seed for each candidate. noises: one [B, C, T, H, W] per candidate; random_states: of the CPU's
    global generator after each was drawn; both are filled by `generate_noise`.
    """

    def __init__(self, sources: list):
        self.sources, self.seeds, self.seed = sources, [source.seed for source in sources], sources[0].seed
        self.noises: list[torch.Tensor] = []
        self.random_states: list[torch.Tensor] = []

    def generate_noise(self, latent: dict) -> torch.Tensor:
        """The first candidate's noise, as stock samplers ask for it."""
        self.noises, self.random_states = [], []
        for source in self.sources:
            self.noises.append(source.generate_noise(latent))
            self.random_states.append(torch.get_rng_state())
        return self.noises[0]


@dataclass(frozen=True)
class AdvancedRun:
    """SamplerCustomAdvanced, for a NOISE of each candidate. latent: as it is on the wire, before any preparation."""

    guider: object
    sampler: object
    sigmas: torch.Tensor
    latent: dict
    sources: list

    @property
    def model(self):
        return self.guider.model_patcher

    def with_sampler(self, guider, sampler, noise) -> dict:
        """The LATENT of another guider, sampler and noise on the same latent and schedule."""
        return sampler_nodes().SamplerCustomAdvanced.execute(noise, guider, sampler, self.sigmas, self.latent).args[0]

    def with_steps(self, steps: int) -> "AdvancedRun":
        """The same run with fewer steps: `steps` + 1 evenly spaced noise levels of the schedule."""
        last = len(self.sigmas) - 1
        if not 1 <= steps <= last:
            raise PlanError(f"{steps} draft steps of a schedule of {last}: expected 1 to {last}")
        return replace(self, sigmas=self.sigmas[torch.linspace(0, last, steps + 1).round().long()])

    def ordinary(self, candidate: int, model) -> dict:
        """The LATENT of a candidate's ordinary run on `model`, a clone of the guider's."""
        return self.with_sampler(copy_guider(self.guider, model), self.sampler, self.sources[candidate])


@dataclass(frozen=True)
class KSamplerRun:
    """KSampler, for a seed of each candidate. arguments: the node's inputs after the seed, without the latent."""

    model: object
    arguments: dict
    latent: dict
    seeds: list[int]

    @property
    def guider(self):
        guider = comfy.samplers.CFGGuider(self.model)
        guider.set_conds(self.arguments["positive"], self.arguments["negative"])
        guider.set_cfg(self.arguments["cfg"])
        return guider

    @property
    def sources(self) -> list:
        return [sampler_nodes().Noise_RandomNoise(seed) for seed in self.seeds]

    @property
    def _stock(self):
        a = self.arguments
        return comfy.samplers.KSampler(
            self.model, steps=a["steps"], device=self.model.load_device, sampler=a["sampler_name"], scheduler=a["scheduler"],
            denoise=a["denoise"], model_options=self.model.model_options,
        )  # fmt: skip

    @property
    def sampler(self):
        return comfy.samplers.sampler_object(self._stock.sampler)

    @property
    def sigmas(self) -> torch.Tensor:
        return self._stock.sigmas

    def with_sampler(self, guider, sampler, noise) -> dict:
        """The LATENT of another guider, sampler and noise on the same latent and schedule."""
        out = sampler_nodes().SamplerCustomAdvanced.execute(noise, guider, sampler, self.sigmas, self.latent).args[0]
        # The only thing that KSampler does beyond SamplerCustomAdvanced.
        return {**out, "samples": out["samples"].to(comfy.model_management.intermediate_dtype())}

    def with_steps(self, steps: int) -> "KSamplerRun":
        """The same run with fewer steps of the same scheduler."""
        if not 1 <= steps <= self.arguments["steps"]:
            raise PlanError(f"{steps} draft steps of {self.arguments['steps']}: expected 1 to {self.arguments['steps']}")
        return replace(self, arguments={**self.arguments, "steps": steps})

    def ordinary(self, candidate: int, model) -> dict:
        """The LATENT of a candidate's ordinary run on `model`, a clone of the node's."""
        return comfyui_nodes.common_ksampler(model, self.seeds[candidate], latent=self.latent, **self.arguments)[0]


def model_for(run, counter: ForwardCounter, without_cache: bool):
    """A clone of the run's model that counts its forwards, and that has no step cache if asked."""
    model = run.model.clone()
    if without_cache:
        step_cache.remove_from(model)
    counter.add_to(model)
    return model

"""Best-of-N over seeds: by a race that drops candidates while they are noisy, or by drafts; winners are ordinary runs."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import comfy.utils
import torch

from ..kernels.prism.plan import Plan, PlanError, rank
from ..kernels.prism.race import CandidateResult
from ..kernels.rewards.reward import FINISHED
from ..kernels.rewards.schedule import at
from . import step_cache
from .guider_view import Scoring, measure_finished
from .latent_thumbnail import thumbnail
from .ordinary_run import CandidateNoises, model_for
from .prism_score import KEY, parse_sigmas
from .race import ForwardCounter, Race, RaceSettings, Watcher, copy_guider, passes_of, reserve_memory
from .race_board import Outcome, outcome_of
from .reward_type import ScoredBy

TITLE = "Best-of-N"
NO_STEPS = "No steps to sample (denoise 0, or an empty schedule): the latent is unchanged, no candidate was scored"
# Plans of the node. CHECKPOINTS: as its input `checkpoints` says; the presets: after these shares of the steps.
CHECKPOINTS, DRAFTS = "checkpoints", "drafts"
PRESETS = {"fast": (0.15,), "balanced": (0.15, 0.4), "careful": (0.15, 0.4, 0.65)}
PLANS = (CHECKPOINTS, *PRESETS, DRAFTS)
MOST_CANDIDATES, MOST_KEPT, MOST_STEPS = 1024, 64, 10000


@dataclass(frozen=True)
class Settings:
    """The inputs of the node. plan: one of PLANS; finalists: 0 for as many as are kept; draft_steps: of DRAFTS, 0 for all."""

    checkpoints: str
    keep: int
    finish: str
    chunk: int = 1
    plan: str = CHECKPOINTS
    finalists: int = 0
    draft_steps: int = 0

    def for_race(self) -> RaceSettings:
        shares = PRESETS.get(self.plan)
        points = parse_checkpoints(self.checkpoints) if shares is None else [(s, True) for s in shares]
        return RaceSettings(
            lambda schedule: sigmas_of(points, schedule), self.keep, self.finish, self.chunk, max(self.finalists, self.keep)
        )


def parse_checkpoints(text: str) -> list[tuple[float, bool]]:
    """(value, whether it is a share of the steps) of a text such as "0.98, 0.95" or "15 %, 40 %". Raises ValueError."""
    source = f"{TITLE}, input 'checkpoints'"
    shares, sigmas = [], []
    for part in text.replace(" %", "%").replace(",", " ").split():
        (shares if part.endswith("%") else sigmas).append(part.removesuffix("%"))
    out = [(s, False) for s in parse_sigmas(", ".join(sigmas), source)] if sigmas or not shares else []
    for share in shares:
        try:
            value = float(share) / 100
        except ValueError:
            value = -1.0
        if not 0 < value < 1:
            raise ValueError(f"{source}: found '{share} %', expected a share of the steps between 0 % and 100 %")
        out.append((value, True))
    return out


def wrong_plan(
    candidates: int | None, keep: int | None, checkpoints: str | None, plan: str | None, steps: int | None = None
) -> str | None:  # fmt: skip
    """What is wrong with these widgets, as a node's validate_inputs says it; None: nothing. A connected input is None."""
    if candidates is not None and not 1 <= candidates <= MOST_CANDIDATES:
        return f"input 'candidates': found {candidates}, expected 1 to {MOST_CANDIDATES}"
    if keep is not None and not 1 <= keep <= MOST_KEPT:
        return f"input 'keep': found {keep}, expected 1 to {MOST_KEPT}"
    if keep is not None and candidates is not None and keep > candidates:
        return f"input 'keep': found {keep} of {candidates} candidates, expected 1 to {candidates}"
    if steps is not None and not 1 <= steps <= MOST_STEPS:
        return f"input 'steps': found {steps}, expected 1 to {MOST_STEPS}"
    drops = candidates is not None and keep is not None and keep < candidates
    if steps is not None and steps < 2 and drops and plan != DRAFTS:
        return f"input 'steps': found {steps}, expected 2 or more, as candidates are dropped after one; or plan '{DRAFTS}'"
    if plan is not None and plan not in PLANS:
        return f"input 'plan': found '{plan}', expected one of {', '.join(PLANS)}"
    if checkpoints is not None and plan == CHECKPOINTS:
        try:
            parse_checkpoints(checkpoints)
        except ValueError as e:
            return f"{str(e).removeprefix(f'{TITLE}, ')}. For steps give shares of them, such as 15 %, 40 %"
    return None


def sigmas_of(points: Sequence[tuple[float, bool]], schedule: Sequence[float]) -> list[float]:
    """The noise levels of checkpoints: a share of the steps is the level after that share of a schedule, at least one step."""
    steps = len(schedule) - 1
    return [schedule[min(max(1, round(value * steps)), max(1, steps - 1))] if share else value for value, share in points]


def search(stock, scored_by: ScoredBy, settings: Settings, vae=None, watcher: Watcher | None = None) -> Outcome:
    """The outcome of a Best-of-N. stock: an AdvancedRun or a KSamplerRun; watcher: is told how it goes on.

    Raises ValueError, RewardError, BackboneError, LatentSpaceError or PlanError.
    """
    warning = scored_by.require_model(stock.model)
    seeds, schedule = [source.seed for source in stock.sources], stock.sigmas
    if settings.keep > len(seeds):
        raise PlanError(
            f"{TITLE}, input 'keep': keep {settings.keep} of {len(seeds)} candidates: expected 1 to {len(seeds)}"
        )
    if settings.keep == len(seeds) or schedule.shape[-1] < 2:
        outcome = _all_kept(stock, seeds[: settings.keep], scored_by)
        outcome.notes += () if schedule.shape[-1] > 1 else (NO_STEPS,)
    elif settings.plan == DRAFTS:
        outcome = _drafts(stock, scored_by, settings, vae, watcher)
    else:
        outcome = _race(stock, scored_by, settings.for_race(), vae, watcher)
    if watcher is not None:
        _show(stock, outcome.winners, outcome.latents, watcher)
    return outcome if warning is None else replace(outcome, notes=(warning, *outcome.notes))


def _show(stock, candidates: Sequence[int], latents: Sequence[dict], watcher: Watcher) -> None:
    """Shows finished candidates to the watcher."""
    model = stock.model.model
    for i, latent in zip(candidates, latents, strict=True):
        watcher.preview(i, model.process_latent_in(latent["samples"]), model.latent_format)


def _race(stock, scored_by: ScoredBy, settings: RaceSettings, vae, watcher) -> Outcome:
    counter, noises = ForwardCounter(), CandidateNoises(stock.sources)
    model = with_patchers(model_for(stock, counter, without_cache=False), scored_by)
    reserve_memory(model, min(settings.chunk, len(noises.seeds)))
    racing = Race(stock.sampler, scored_by.reward, noises, settings, counter, vae, watcher)
    latent = stock.with_sampler(copy_guider(stock.guider, model), racing, noises)
    outcome = outcome_of(racing, latent)
    if racing.plan.restarts:
        outcome.latents, forwards = _ordinary(stock, outcome.winners, without_cache=True)
        outcome.add_forwards(forwards)
    else:
        outcome.latents = _one_each(latent, len(outcome.winners))
    if racing.plan.finalists > racing.plan.keep:
        _choose_finished(outcome, stock, scored_by, vae, racing.plan.keep)
    return outcome


def _drafts(stock, scored_by: ScoredBy, settings: Settings, vae, watcher) -> Outcome:
    """Every candidate is sampled with fewer steps, or under the model's step cache; the best are sampled again in full."""
    steps, count = len(stock.sigmas) - 1, len(stock.sources)
    cached = step_cache.is_used(stock.model.model_options)
    if not settings.draft_steps and not cached:
        raise PlanError(
            f"{TITLE}: plan '{DRAFTS}' without a draft: set draft_steps to fewer than {steps} steps, or put EasyCache on the "
            "model"
        )
    run = stock.with_steps(settings.draft_steps) if settings.draft_steps else stock
    latents, forwards = _ordinary(run, list(range(count)), without_cache=False)
    outcome = _outcome_without_race(stock, latents, scored_by, list(range(count)))
    outcome.add_forwards(forwards)
    if watcher is not None:
        _show(stock, range(count), latents, watcher)
    passes = _choose_finished(outcome, stock, scored_by, vae, settings.keep, step=0)
    outcome.plan = Plan(count, settings.keep, settings.keep, steps, (), passes, outcome.depth)
    outcome.latents, forwards = _ordinary(stock, outcome.winners, without_cache=True)
    outcome.add_forwards(forwards)
    made = f"{settings.draft_steps} steps" if settings.draft_steps else "a step cache"
    outcome.notes += (f"Candidates were drafts with {made}; winners were sampled again in full",)
    return outcome


def _all_kept(stock, seeds: list[int], scored_by: ScoredBy) -> Outcome:
    """The outcome where every candidate is kept: nothing is scored, and each is the stock node's clip."""
    latents, forwards = _ordinary(stock, list(range(len(seeds))), without_cache=False)
    outcome = _outcome_without_race(stock, latents, scored_by, list(range(len(seeds))))
    outcome.add_forwards(forwards)
    return outcome


def _ordinary(stock, candidates: list[int], without_cache: bool) -> tuple[list[dict], int]:
    """(the LATENT of each candidate's ordinary run, forwards of one clip that ran)."""
    counter = ForwardCounter()
    model = model_for(stock, counter, without_cache)
    latents = [stock.ordinary(i, model) for i in candidates]
    return latents, counter.rows // latents[0]["samples"].shape[0]


def _outcome_without_race(stock, latents: list[dict], scored_by: ScoredBy, candidates: list[int]) -> Outcome:
    model = stock.model.model
    outcome = Outcome(
        latents, [source.seed for source in stock.sources], scored_by.reward, [CandidateResult(i) for i in candidates],
        candidates, len(model.diffusion_model.blocks),
    )  # fmt: skip
    for i, latent in zip(candidates, latents, strict=True):
        outcome.thumbnails[i] = thumbnail(model.process_latent_in(latent["samples"]), model.latent_format)
    return outcome


def _choose_finished(outcome: Outcome, stock, scored_by: ScoredBy, vae, keep: int, step: int | None = None) -> int:
    """Scores the outcome's latents and keeps the best `keep`; returns the forwards of a step.

    step: at which the others count as dropped, None for the end of the plan.
    """
    step = outcome.plan.steps if step is None else step
    guider = copy_guider(stock.guider, with_patchers(stock.model.clone(), scored_by))
    reward = at(scored_by.reward, FINISHED)
    raw = torch.cat([latent["samples"] for latent in outcome.latents])
    bar = comfy.utils.ProgressBar(len(raw))
    scoring = FinalScoring(reward, vae, bar.update)
    scores = reward.scores(measure_finished(guider, raw, scoring))
    parts = scores.split(len(raw) // len(outcome.latents))
    outcome.blocks += scoring.blocks * len(parts[0])
    for i, part in zip(outcome.winners, parts, strict=True):
        outcome.board[i].clip_scores[step] = part.tolist()
    best = rank([float(part.mean()) for part in parts], keep)
    for place, i in enumerate(outcome.winners):
        if place not in best:
            outcome.board[i].dropped = step
    outcome.latents = [outcome.latents[place] for place in best]
    outcome.winners = [outcome.winners[place] for place in best]
    return scoring.passes


class FinalScoring(Scoring):
    """Also finds out how many forwards a step of the guider takes."""

    passes = 1

    def sample(self, model_wrap, *args, **kwargs):
        self.passes = passes_of(model_wrap)
        return super().sample(model_wrap, *args, **kwargs)


def with_patchers(model, scored_by: ScoredBy):
    """The clone of a model, which loads what the reward needs together with it."""
    if scored_by.patchers:
        model.set_additional_models(KEY, [*model.get_additional_models_with_key(KEY), *scored_by.patchers])
    return model


def _one_each(latent: dict, count: int) -> list[dict]:
    """LATENTs of each winner, from one of all."""
    return [{**latent, "samples": part} for part in latent["samples"].chunk(count)] if count > 1 else [latent]

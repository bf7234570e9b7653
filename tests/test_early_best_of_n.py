"""Early Best-of-N outside ComfyUI: the winner's latent is an ordinary run's, at the plan's cost, with and without guidance."""

import pytest
import torch

pytest.importorskip("diffusers")

from benchmarks.toy_world import pipeline, weights
from trainers.kernels.prism.head import HeadConfig, PrismHead
from trainers.kernels.prism.plan import make_plan
from trainers.scorers.early_best_of_n import GuidedNetwork, search
from trainers.scorers.prism_network import Scorer
from trainers.wan import dit as wan_dit
from trainers.wan.sampling import Denoiser, euler

TAP, DEPTH = 7, 12


@pytest.mark.parametrize("cfg", [2.0, 1.0])
def test_the_winner_is_the_best_scored_and_sampled_as_if_alone(cfg):
    dit = weights.load_dit(weights.FOLDER / weights.DIT)
    torch.manual_seed(0)
    head = PrismHead(HeadConfig(128, dim=32, heads=2, layers=2, taps=(TAP,))).train(False)
    for p in head.parameters():
        p.data.add_(0.3 * torch.randn_like(p))
    scorer = Scorer(wan_dit.load(weights.FOLDER / weights.DIT, TAP), head)
    words = torch.randn(5, 256)
    negative = torch.randn(2, 256) if cfg != 1.0 else None
    sigmas = pipeline.sigmas(4, pipeline.SHIFT).tolist()
    noises = pipeline.initial_noise([0, 1, 2]).split(1)
    plan = make_plan(sigmas, 3, 1, (sigmas[1],), (1,), passes=1 if cfg == 1.0 else 2, depth=DEPTH, scoring=TAP + 1)
    network = GuidedNetwork(dit, scorer, words, negative, cfg)
    found = search(plan, network, noises, sigmas)
    assert network.blocks == plan.cost.blocks
    # The plain way: candidates run to the end, each scored on its latent before step 1.
    states = {}
    with torch.no_grad():
        alone = []
        for i, noise in enumerate(noises):
            watch = lambda x, sigma, step, i=i: states.__setitem__((i, step), x)  # noqa: E731
            alone.append(euler(Denoiser(dit, [words], negative, cfg), noise, sigmas, watch=watch))
        scores = [float(scorer(states[i, 1], torch.tensor([sigmas[1]]), [words]).mean()) for i in range(3)]
    assert [s.scores[1] for s in found.board] == pytest.approx(scores, abs=1e-4)
    assert found.winners == [scores.index(max(scores))]
    torch.testing.assert_close(found.results[0], alone[found.winners[0]], atol=1e-3, rtol=1e-3)

"""The pretend GPU itself: it raises and counts what CUDA would refuse and wait for, and gives the values of the CPU."""

import pytest
import torch
from torch import nn

from .pretend_gpu import DEVICE, PretendGPU, PretendGPUError, PretendTensor


@pytest.fixture
def gpu():
    with PretendGPU() as running:
        yield running


X = torch.arange(12.0).view(3, 4)


class TestDevices:
    def test_a_tensor_goes_there_and_back(self, gpu):
        x = X.to(DEVICE)
        assert isinstance(x, PretendTensor)
        assert x.device == DEVICE
        assert x.device.type != "cpu"
        for back in (x.cpu(), x.to("cpu"), x.to(X)):
            assert type(back) is torch.Tensor
            assert torch.equal(back, X)
        assert torch.ones(2).to(x).device == DEVICE
        assert x.to(DEVICE) is x

    def test_results_stay_there_and_are_the_cpus(self, gpu):
        x = X.to(DEVICE)
        y = (x @ x.T).softmax(dim=1)[1:, ::2] * 2.0
        assert y.device == DEVICE
        assert torch.equal(y.held, (X @ X.T).softmax(dim=1)[1:, ::2] * 2.0)

    @pytest.mark.parametrize(
        "make",
        [
            lambda d, x: torch.zeros(3, device=d), lambda d, x: torch.arange(3, device=d), lambda d, x: torch.eye(3, device=d),
            lambda d, x: torch.tensor([1.0, 2.0], device=d), lambda d, x: torch.as_tensor([1, 2], device=d),
            lambda d, x: torch.full((2,), 3.0, device=d), lambda d, x: torch.linspace(0, 1, 3, device=d),
            lambda d, x: torch.empty(2, 2, device=d), lambda d, x: x.new_zeros(2), lambda d, x: x.new_tensor([1.0]),
            lambda d, x: torch.zeros_like(x), lambda d, x: x.new_tensor(2), lambda d, x: torch.randn(3, device=d),
        ],
    )  # fmt: skip
    def test_factories_create_there(self, gpu, make):
        made = make(DEVICE, X.to(DEVICE))
        assert isinstance(made, PretendTensor)
        assert torch.isfinite(made.held).all() or made.shape == (2, 2)

    def test_values_of_a_list_arrive(self, gpu):
        assert torch.tensor([1.5, 2.5], device=DEVICE).held.tolist() == [1.5, 2.5]
        assert X.to(DEVICE).new_tensor([1, 2]).held.dtype == torch.float32

    def test_uninitialised_memory_is_not_a_number(self, gpu):
        assert torch.empty(4, device=DEVICE).held.isnan().all()
        assert X.to(DEVICE).new_empty(4).held.isnan().all()

    def test_a_module_moves_with_its_buffers(self, gpu):
        module = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).to(DEVICE)
        assert all(t.device == DEVICE for t in (*module.parameters(), *module.buffers()))
        out = module(X.to(DEVICE))
        out.sum().backward()
        assert module[0].weight.grad.device == DEVICE

    def test_inference_mode_changes_nothing(self, gpu):
        before = X.to(DEVICE)
        with torch.inference_mode():
            assert torch.equal(before.detach()[1:].held, X[1:])
            x = X.to(DEVICE, torch.float64)
            y = nn.functional.linear(x.float(), X.to(DEVICE))
            assert isinstance(y, PretendTensor)
            assert torch.equal(y.to("cpu", torch.float32), X @ X.T)
            with pytest.raises(PretendGPUError):
                nn.functional.linear(y, X[:, :3])
        assert gpu.count() == gpu.count("copy to the CPU") == 1

    def test_lists_are_indices(self, gpu):
        x = X.clone().to(DEVICE)
        assert torch.equal(x[[2, 0]].held, X[[2, 0]])
        assert torch.equal(x[..., [True, False, False, True]].held, X[:, [0, 3]])
        x[[0, 2], 1:] = 7.0
        assert x.held[2].tolist() == [8, 7, 7, 7]
        assert not gpu.count("nonzero")

    def test_a_shape_may_change_in_place(self, gpu):
        x = X[None].clone().to(DEVICE).squeeze_(0)
        assert x.shape == (3, 4)
        assert torch.equal((x + 1).held, X + 1)

    def test_writing_in_place_is_seen_through_views(self, gpu):
        x = X.clone().to(DEVICE)
        x[1].mul_(0)
        x[:, 0] = 5.0
        torch.add(x[2], 1, out=x[0])
        assert x.held[1].tolist() == [5, 0, 0, 0]
        assert x.held[0].tolist() == [6, 10, 11, 12]

    def test_outside_nothing_is_pretended(self):
        with PretendGPU():
            pass
        assert not isinstance(torch.zeros(2, device="meta"), PretendTensor)


class TestMixing:
    @pytest.mark.parametrize(
        "mix",
        [
            lambda x: x + torch.tensor([1.0, 2.0, 3.0, 4.0]),
            lambda x: x * torch.arange(4),
            lambda x: torch.cat([x, torch.zeros(1, 4)]),
            lambda x: torch.where(torch.ones(3, 4, dtype=torch.bool), x, x),
            lambda x: x @ torch.ones(4, 2),
            lambda x: torch.zeros(3, 4).index_add_(0, torch.tensor([0, 1, 2]), x),
            lambda x: torch.zeros(3, 4)[x.long()],
            lambda x: torch.zeros(3, 4).add_(x),
            lambda x: torch.mm(x, x.T, out=torch.empty(3, 3)),
            lambda x: nn.functional.linear(x, torch.ones(2, 4)),
            lambda x: x.gather(1, torch.zeros(3, 1, dtype=torch.long)),
        ],
    )
    def test_tensors_of_both_devices_are_refused(self, gpu, mix):
        with pytest.raises(PretendGPUError, match="same device, found .*CPU.* at tests/test_pretend_gpu.py:"):
            mix(X.to(DEVICE))

    def test_a_generator_of_the_cpu_is_refused(self, gpu):
        with pytest.raises(PretendGPUError, match="generator"):
            torch.randn(3, device=DEVICE, generator=torch.Generator())

    def test_numpy_is_refused(self, gpu):
        with pytest.raises(TypeError, match="numpy"):
            X.to(DEVICE).numpy()

    def test_what_cuda_allows_is_allowed(self, gpu):
        x = X.clone().to(DEVICE)
        assert (x + torch.tensor(2.0)).device == DEVICE
        assert x[torch.tensor([0, 2])].shape == (2, 4)
        x[torch.tensor([0])] = 1.0
        x.copy_(X)
        assert torch.equal(x.held, X)
        assert not gpu.synchronisations


class TestSynchronisations:
    @pytest.mark.parametrize(
        ("kind", "wait"),
        [
            ("item", lambda x: x.sum().item()),
            ("item", lambda x: float(x[0, 0])),
            ("item", lambda x: bool((x > 0).all())),
            ("item", lambda x: torch.tensor([x[0, 0]])),
            ("tolist", lambda x: x.tolist()),
            ("copy to the CPU", lambda x: x.cpu()),
            ("copy to the CPU", lambda x: torch.zeros(3, 4).copy_(x)),
            ("nonzero", lambda x: x.nonzero()),
            ("boolean index", lambda x: x[x > 1]),
            ("boolean index", lambda x: x.index_put_((x > 9,), x[0, :2].clone())),
            ("equal", lambda x: torch.equal(x, x)),
            ("linalg check", lambda x: torch.linalg.inv(x[:, :3] + torch.eye(3, device=x.device))),
            ("repeat_interleave", lambda x: x.repeat_interleave(torch.tensor([1, 2, 3], device=x.device), dim=0)),
        ],
    )
    def test_each_is_counted_where_it_stands(self, gpu, kind, wait):
        x = X.to(DEVICE)
        wait(x)
        assert gpu.count(f"{kind} at tests/test_pretend_gpu.py:") == gpu.count() == 1, gpu.synchronisations

    def test_arithmetic_does_not_wait(self, gpu):
        x = X.to(DEVICE)
        x.masked_fill(x > 3, 0.0).sort(dim=1).values.cumsum(1).amax()
        x[x > 3] = 0.0
        assert not gpu.synchronisations

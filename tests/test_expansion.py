"""One block's experts, apart from any job."""

import torch

from pipeline import expansion
from pipeline.config import Job


def test_out_of_memory_halves_the_batch(monkeypatch):
    """The experts come out in their order and the same, however often memory runs out on the way."""
    generator = torch.Generator().manual_seed(0)
    linears = {"mlp.gate_proj": torch.randn(12, 32, generator=generator), "mlp.up_proj": torch.randn(12, 32, generator=generator)}
    tokens = {expert: torch.randn(100, 32, generator=generator) for expert in range(5)}
    job = Job(model="demo", num_clusters=5)
    [solved] = expansion.solve_experts([job], linears, list(range(5)), tokens.get, [100] * 5)
    expected, reports = solved.weights, solved.reports
    factor, tried = expansion.inverse_factor, []

    def short_of_memory(hessian_ECC):
        tried.append(len(hessian_ECC))
        if len(hessian_ECC) > 1:
            raise torch.OutOfMemoryError
        return factor(hessian_ECC)

    monkeypatch.setattr(expansion, "inverse_factor", short_of_memory)
    [solved] = expansion.solve_experts([job], linears, list(range(5)), tokens.get, [100] * 5)
    got, reports_again = solved.weights, solved.reports
    assert tried == [5, 2, 1, 1, 3, 1, 2, 1, 1]
    assert all(torch.equal(got[path], expected[path]) for path in linears)
    assert reports_again == reports


def test_jobs_that_share_factors_get_what_they_would_alone():
    generator = torch.Generator().manual_seed(1)
    linears = {"mlp.gate_proj": torch.randn(12, 32, generator=generator), "mlp.up_proj": torch.randn(8, 32, generator=generator)}
    tokens = {expert: torch.randn(100, 32, generator=generator) for expert in range(2)}
    jobs = [Job(model="demo", num_clusters=2, sparsity="0.5"), Job(model="demo", num_clusters=2, sparsity="2:4", quantize=True)]
    together = expansion.solve_experts(jobs, linears, [0, 1], tokens.get, [100, 100])
    for job, solved in zip(jobs, together):
        [alone] = expansion.solve_experts([job], linears, [0, 1], tokens.get, [100, 100])
        assert all(torch.equal(solved.weights[path], alone.weights[path]) for path in linears) and solved.reports == alone.reports
        assert solved.grids.keys() == (linears.keys() if job.quantize else set())

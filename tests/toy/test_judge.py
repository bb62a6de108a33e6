"""The Frechet distance against optimal transport maps, which give it without a matrix root."""

import pytest
import torch

from train.evaluate.judge import Evaluator, Judge, frechet, load_evaluator
from train.toy.pictures import Pair


@pytest.mark.parametrize("seed", range(3))
def test_frechet_equals_the_cost_of_the_optimal_map(seed):
    # x -> A x + b with A symmetric positive semi-definite is the optimal map between the two Gaussians, so the
    # distance is the mean squared way: |(A-I)m + b|^2 + tr((A-I) S (A-I)).
    generator = torch.Generator().manual_seed(seed)
    x = (
        torch.randn(500, 12, generator=generator, dtype=torch.float64)
        @ torch.randn(12, 12, generator=generator).double()
    )
    x = x + torch.randn(12, generator=generator)
    half = torch.randn(12, 9, generator=generator, dtype=torch.float64)
    a, b = half @ half.T / 9, torch.randn(12, generator=generator, dtype=torch.float64)
    way = x @ (a - torch.eye(12)) + b
    expected = way.mean(0).square().sum() + way.var(0).sum()
    assert frechet(x, x @ a + b) == pytest.approx(expected.item(), rel=1e-6)


def test_frechet_of_a_set_with_itself_is_zero_and_it_is_symmetric():
    a, b = torch.randn(90, 7), torch.randn(70, 7) * 2 + 1
    assert frechet(a, a) == pytest.approx(0, abs=1e-6)
    assert frechet(a, b) == pytest.approx(frechet(b, a), rel=1e-6)
    with pytest.raises(ValueError, match="n >= 2"):
        frechet(a[:1], b)


def test_evaluator_survives_the_disk(tmp_path):
    torch.manual_seed(3)
    made = Evaluator(5, 3)
    made.save(tmp_path)
    x = torch.rand(2, 3, 128, 128) * 2 - 1
    with torch.no_grad():
        for first, second in zip(made(x), load_evaluator(tmp_path)(x), strict=True):
            assert torch.equal(first, second)
    with pytest.raises(FileNotFoundError, match="toy-evaluator"):
        load_evaluator(tmp_path / "nowhere")


def test_judge_knows_real_pictures_and_notices_swapped_captions(root):
    judge = Judge(root / "toy" / "evaluator", root / "toy" / "data", variants=1)
    pairs = [Pair(s, c) for s in range(0, 32, 2) for c in (s // 2 % 8, (s // 2 + 3) % 8)]
    images = torch.stack([judge.pictures.draw(pair, 2000) for pair in pairs])
    right = judge.score(images, pairs)
    assert right.subject >= 0.9
    assert right.color >= 0.9
    swapped = judge.score(images, [Pair((p.subject + 1) % 32, (p.color + 1) % 8) for p in pairs])
    assert swapped.subject <= 0.1
    assert swapped.color <= 0.1
    noise = judge.score(torch.randn(images.shape).clamp(-1, 1), pairs)
    assert noise.frechet > 5 * right.frechet

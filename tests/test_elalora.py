"""ElaLoRA: its schedule, the two rules by which ranks move, growth, and what a round leaves alone."""

import pytest
import torch

from slimtune.controllers.elalora import exchange, exchange_by_value, moving, outside

# ---------------------------------------------------------------- the plan of one round


def test_schedule_is_the_papers():
    """b(t), golden: b = 4, t_w = 300, t_f = 500, T = 2000."""
    steps = (0, 300, 500, 900, 1100, 1300, 1400, 1450, 1490, 1999)
    assert [moving(t, 4, 300, 500, 2000) for t in steps] == [4, 4, 4, 4, 3, 2, 1, 0, 0, 0]
    assert [moving(t, 4, 300, 500, 2000, schedule=False) for t in (300, 1490)] == [4, 4]


def test_published_rule_golden_round():
    gone, grown = exchange([(0.1, 0.2, 0.9), (0.3, 0.4, 0.5), (2.0, 3.0, 4.0)], k=2, b=2)
    assert gone == [(0, 0), (0, 1)] and grown == [2, 2]


def sizes(scores, gone, grown):
    return [len(row) - sum(i == g for g, _ in gone) + grown.count(i) for i, row in enumerate(scores)]


@pytest.mark.parametrize("rule", ["published", "improved"])
@pytest.mark.parametrize("seed", range(5))
def test_rounds_keep_the_total_the_floor_and_the_ceilings(rule, seed):
    draw = torch.Generator().manual_seed(seed)
    ranks, ceilings, shapes = [3, 1, 4, 2, 5], [6, 2, 5, 4, 6], set()
    for n in range(60):
        scores = [torch.rand(r, generator=draw).mul(5).round().tolist() for r in ranks]  # full of ties
        if rule == "published":
            gone, grown = exchange(scores, 2, 4, ceilings)
        else:
            gone, grown = exchange_by_value(scores, 2, 4, [1] * 5, ceilings=ceilings)
        ranks = sizes(scores, gone, grown)
        assert sum(ranks) == 15 and len(gone) == len(grown) <= 4, n
        assert all(1 <= r <= c for r, c in zip(ranks, ceilings, strict=True))
        assert len(set(gone)) == len(gone)
        assert all(sum(i == g for g, _ in gone) <= 2 and grown.count(i) <= 2 for i in range(5))
        shapes.add(tuple(ranks))
    assert len(shapes) > 4


def test_ties_move_no_more_than_asked():
    """The published code removes every rank at the threshold while adding only b."""
    scores = [[1.0] * 3] * 4
    gone, grown = exchange(scores, k=2, b=2)
    assert gone == [(0, 0), (0, 1)] and grown == [3, 3]
    assert exchange_by_value(scores, 2, 2, [1] * 4) == ([], [])  # nothing is worth moving


def test_more_moves_than_candidates():
    """The published code stops with an error where it has fewer candidates than b, and below 2 b candidates removes
    and grows for the same one."""
    assert exchange([(1.0, 2.0), (3.0,)], k=2, b=2) == ([], [])  # one candidate
    gone, grown = exchange([(1.0, 2.0), (3.0, 4.0), (5.0, 6.0)], k=2, b=2)  # three: one pair
    assert gone == [(0, 0)] and grown == [2]
    assert exchange([], k=2, b=2) == ([], [])


def test_a_full_layer_passes_its_turn():
    scores = [(0.1, 0.2, 0.9), (0.3, 0.4, 0.5), (2.0, 3.0, 4.0)]
    assert exchange(scores, 2, 2, [9, 9, 4]) == ([(0, 0), (0, 1)], [1, 2])
    assert exchange_by_value(scores, 2, 2, [1] * 3, ceilings=[9, 9, 4]) == ([(0, 0), (0, 1)], [1, 2])


def test_a_layer_of_rank_one_grows_by_the_improved_rule_only():
    """Published: candidates number min(k, r - 1), so a layer of rank 1 is never asked."""
    scores = [(1.0, 2.0, 3.0), (9.0,), (1.5, 2.0, 3.0)]
    assert 1 not in exchange(scores, 2, 1)[1]
    assert exchange_by_value(scores, 2, 1, [1] * 3) == ([(0, 0)], [1])


def test_improved_rule_weighs_parameters():
    """sqrt(score) / cost: the wide layer's rank is worth more in all and less per parameter, and pays for two."""
    scores, costs = [(4.0, 9.0), (9.0, 16.0), (25.0, 25.0)], [1, 1, 5]
    gone, grown = exchange_by_value(scores, 2, 4, costs)
    assert gone == [(2, 0)] and grown == [0, 0, 1, 1]  # 5 parameters free, 4 spent
    assert exchange_by_value(scores, 1, 4, [1, 1, 1]) == ([(0, 0)], [2])


def test_parameters_stay_within_the_budget_and_close_to_it():
    draw = torch.Generator().manual_seed(0)
    costs, ranks, moved = [3, 3, 7, 11], [4, 4, 4, 4], 0
    budget = sum(c * r for c, r in zip(costs, ranks, strict=True))
    for _ in range(200):
        spent = sum(c * r for c, r in zip(costs, ranks, strict=True))
        assert budget - 2 * max(costs) < spent <= budget
        scores = [torch.rand(r, generator=draw).tolist() for r in ranks]
        gone, grown = exchange_by_value(scores, 2, 3, costs, slack=budget - spent)
        ranks, moved = sizes(scores, gone, grown), moved + len(grown)
    assert moved > 50


def test_fresh_ranks_are_neither_taken_nor_asked():
    scores = [(0.0, 5.0), (1.0, 2.0), (9.0, 9.0)]
    assert exchange_by_value(scores, 1, 1, [1] * 3) == ([(0, 0)], [2])
    fresh = [[True, False], [False, False], [True, True]]
    assert exchange_by_value(scores, 1, 1, [1] * 3, fresh=fresh) == ([(1, 0)], [0])


# ---------------------------------------------------------------- new directions


def test_new_direction_is_orthogonal_where_the_published_one_is_not():
    """|a_j v| / |a_j|, rows of A at N(0, 0.02^2), I = 768, R = 10; 4e-8 for the published form at orthonormal rows."""
    draw = torch.Generator().manual_seed(0)
    A, v = 0.02 * torch.randn(10, 768, generator=draw), torch.randn(768, generator=draw)
    rows = A / A.norm(dim=1, keepdim=True)
    assert (rows @ outside(A.t(), v)).abs().max() < 1e-6
    assert (rows @ outside(A.t(), v, exact=False)).abs().max() > 0.02
    Q = torch.linalg.qr(A.t())[0]
    assert (Q.t() @ outside(Q, v, exact=False)).abs().max() < 1e-6
    assert outside(A.t(), v).norm() == pytest.approx(1.0, abs=1e-5)

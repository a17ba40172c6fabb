"""Random numbers of a step: of the seed, the step and the seat, and of nothing that happened before."""

import random

import numpy as np
import torch

from framework.training.streams import seed_streams, stream_seed


def draw():
    return random.random(), float(np.random.rand()), torch.rand(3).tolist(), torch.nn.functional.dropout(torch.ones(64)).tolist()


def test_a_step_draws_the_same_whatever_was_drawn_before():
    seed_streams(7, 12, (0, 1))
    first = draw()
    for _ in range(5):
        draw()
    seed_streams(7, 12, (0, 1))
    assert draw() == first


def test_seeds_steps_stages_and_replicas_all_draw_their_own():
    seeds = {stream_seed(s, step, (pp, dp)) for s in range(3) for step in range(20) for pp in range(4) for dp in range(4)}
    assert len(seeds) == 3 * 20 * 16 and all(0 <= seed < 1 << 63 for seed in seeds)

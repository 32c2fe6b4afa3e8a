"""Pieces, not hooks: a training loop of your own around `train_step`.

python examples/your_own_loop.py demo/data/ethanol_500K.extxyz.xz
"""

import sys

import torch

from gossamer.data.dataset import DataConfig, load_data
from gossamer.data.statistics import compute_statistics
from gossamer.evaluation import evaluate_potential
from gossamer.models import LEIGNNConfig
from gossamer.potential import Potential
from gossamer.training.loader import Loader, epoch_batches
from gossamer.training.loop import LossConfig, TrainingConfig, make_state, train_step
from gossamer.training.process_group import start_process_group

torch.manual_seed(0)
train, valid, _ = load_data(DataConfig(train=sys.argv[1]))
model = LEIGNNConfig(num_features=16, num_layers=2, cutoff=4.0)
potential = Potential(model, compute_statistics(train, model.cutoff))
loss, training, group = LossConfig(), TrainingConfig(steps=150, learning_rate=5e-3), start_process_group("cpu")
state = make_state(potential, training, loss)
loader = Loader(potential, train)

for epoch in range(3):
    batches = epoch_batches(len(train), 8, seed=0, epoch=epoch)
    for graph in loader.graphs(batches):
        train_step(state, graph, loss, training, group)
        state.step += 1
    print(f"epoch {epoch}: forces {evaluate_potential(state.ema.module.eval(), valid).forces.mae:.0f} meV/Å")

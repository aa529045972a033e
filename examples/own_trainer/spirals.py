"""Tells two spirals apart: a training program of one's own, in plain PyTorch. Its study is spirals.toml."""

import torch
from torch import nn


def spirals(count, generator):
    angle = 2.5 * torch.pi * torch.rand(count, generator=generator).sqrt()
    label = torch.randint(2, (count,), generator=generator)
    turned = angle + torch.pi * label
    points = torch.stack([turned.cos(), turned.sin()], 1) * angle[:, None] / 8
    return points + 0.02 * torch.randn(count, 2, generator=generator), label


def train(trial):
    width, optimizer = trial.config["width"], trial.config["optimizer"]
    torch.manual_seed(trial.seed)
    draws = torch.Generator().manual_seed(trial.seed)
    points, labels = spirals(1000, torch.Generator().manual_seed(0))
    layers = [nn.Linear(2, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 2)]
    network = nn.Sequential(*layers).to(trial.device)
    adam = torch.optim.AdamW(network.parameters(), lr=optimizer["rate"], weight_decay=optimizer["decay"])
    epoch = 0
    if saved := trial.saved("state.pt"):
        epoch, weights, moments, drawn = torch.load(saved)
        network.load_state_dict(weights)
        adam.load_state_dict(moments)
        draws.set_state(drawn)
    while epoch < trial.config["epochs"]:
        if trial.should_stop():
            trial.requeue()
        for _ in range(20):
            batch, wanted = spirals(128, draws)
            loss = nn.functional.cross_entropy(network(batch.to(trial.device)), wanted.to(trial.device))
            adam.zero_grad()
            loss.backward()
            adam.step()
        epoch += 1
        found = network(points.to(trial.device)).argmax(1).cpu()
        is_over = trial.report(epoch, (found == labels).float().mean(), loss=loss)
        with trial.saving("state.pt") as path:
            torch.save((epoch, network.state_dict(), adam.state_dict(), draws.get_state()), path)
        if is_over:
            return

"""Recurrent PPO on a memory task: act step by step with `stream()`, learn from sequences with `resets`.

A cue, left or right, is shown at the first step of an episode only. Some steps later, at a junction, the
agent has to turn that way. Episodes have different lengths, so one rollout holds many, whole and cut off.

Acting takes one step at a time, without gradients and with the weights that the last update left: a stream.
Learning computes each rollout as one sequence; `resets` keeps the episodes in it apart. With `--core torch`
the same agent has a `torch.nn.LSTM` and goes step by step, cleaning the state by hand, as is usual. `--core
both` compares them, and `--plot FILE` draws the learning curves.

    python examples/recurrent_ppo.py [--core layernorm|torch|both] [--iterations N] [--length L] [--plot FILE]
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributions import Categorical

from layernorm import LayerNormLSTM

ENVIRONMENTS, STEPS, HIDDEN = 64, 64, 64
EPOCHS, MINIBATCHES, CLIP, DISCOUNT, TRACE = 3, 4, 0.2, 0.99, 0.95


class Corridors:
    """Many corridors side by side; what is seen is the cue, whether the junction is reached, and noise."""

    def __init__(self, count: int, length: int) -> None:
        self.length = length
        self.cue = torch.empty(count)
        self.left = torch.empty(count, dtype=torch.int64)  # steps to the junction
        self.begin(torch.ones(count, dtype=torch.bool))

    def begin(self, which: Tensor) -> None:
        """Begin new episodes."""
        count = int(which.sum())
        self.cue[which] = torch.randint(2, (count,)).float() * 2 - 1
        self.left[which] = torch.randint(self.length // 2, self.length + 1, (count,))
        self.is_first = which

    def observe(self) -> Tensor:
        """Return what is seen now."""
        shown = torch.where(self.is_first, self.cue, 0.0)
        return torch.stack([shown, (self.left == 0).float(), torch.randn(len(self.cue)) * 0.5], 1)

    def act(self, action: Tensor) -> tuple[Tensor, Tensor]:
        """Go on, or turn at the junction; return the reward, and which episodes have ended."""
        ended = self.left == 0
        reward = torch.where(ended, torch.where(action * 2 - 1 == self.cue, 1.0, -1.0), 0.0)
        self.left -= 1
        self.begin(ended)
        return reward, ended


class Agent(nn.Module):
    """A recurrent policy and value function of (T, N, 3) observations."""

    def __init__(self, core: str) -> None:
        super().__init__()
        self.encode = nn.Sequential(nn.Linear(3, HIDDEN), nn.Tanh())
        self.core: nn.LSTM
        if core == "layernorm":
            self.core = LayerNormLSTM(HIDDEN, HIDDEN, forget_bias=1)
        else:
            self.core = nn.LSTM(HIDDEN, HIDDEN)
            with torch.no_grad():
                self.core.bias_ih_l0[HIDDEN : 2 * HIDDEN] += 1  # likewise
        self.policy, self.value = nn.Linear(HIDDEN, 2), nn.Linear(HIDDEN, 1)

    def sequence(self, observed: Tensor, state: tuple[Tensor, Tensor], resets: Tensor) -> Tensor:
        """Return the features of a rollout, whose episodes begin at `resets` (T, N)."""
        x = self.encode(observed)
        if isinstance(self.core, LayerNormLSTM):
            return self.core(x, state, resets)[0]
        outputs = []
        for x_t, reset in zip(x, resets, strict=True):
            state = tuple(s * ~reset.unsqueeze(-1) for s in state)  # type: ignore[assignment]
            output, state = self.core(x_t.unsqueeze(0), state)
            outputs.append(output)
        return torch.cat(outputs)


@dataclass
class Rollout:
    """What was seen, done and gained, each (T, N, ...); the state before, and the value of what follows."""

    observed: Tensor
    resets: Tensor
    actions: Tensor
    log_probs: Tensor
    values: Tensor
    rewards: Tensor
    ended: Tensor
    state: tuple[Tensor, Tensor]
    last_value: Tensor


class Actor:
    """Acts with an agent's weights as they are at each `refresh`, one step at a time."""

    def __init__(self, agent: Agent, environments: Corridors) -> None:
        self.agent, self.environments = agent, environments
        core = agent.core
        self.stream = core.stream(ENVIRONMENTS) if isinstance(core, LayerNormLSTM) else None
        self.state = (torch.zeros(1, ENVIRONMENTS, HIDDEN), torch.zeros(1, ENVIRONMENTS, HIDDEN))

    def features(self, observed: Tensor, resets: Tensor) -> Tensor:
        """Take a step (N, 3) and return its features."""
        x = self.agent.encode(observed)
        if self.stream is not None:
            self.stream.reset(resets)
            return self.stream.step(x)
        state = tuple(s * ~resets.unsqueeze(-1) for s in self.state)
        output, self.state = self.agent.core(x.unsqueeze(0), state)
        return output[0]

    @torch.no_grad()
    def rollout(self) -> Rollout:
        """Act for `STEPS` steps."""
        if self.stream is not None:
            self.stream.refresh()
            self.state = self.stream.state
        start, steps = self.state, []
        for _ in range(STEPS):
            observed, resets = self.environments.observe(), self.environments.is_first
            features = self.features(observed, resets)
            choice = Categorical(logits=self.agent.policy(features))
            action = choice.sample()
            value = self.agent.value(features).squeeze(-1)
            reward, ended = self.environments.act(action)
            steps.append((observed, resets, action, choice.log_prob(action), value, reward, ended))
        state = self.stream.state if self.stream is not None else self.state
        observed, resets = self.environments.observe(), self.environments.is_first
        last = self.agent.sequence(observed.unsqueeze(0), state, resets.unsqueeze(0))
        values = self.agent.value(last[0]).squeeze(-1)
        return Rollout(*map(torch.stack, zip(*steps, strict=True)), start, values)


def advantages(rollout: Rollout) -> Tensor:
    """Return generalized advantage estimates (Schulman et al. 2016), (T, N)."""
    found, gain, after = [], torch.zeros(ENVIRONMENTS), rollout.last_value
    for t in reversed(range(STEPS)):
        goes_on = (~rollout.ended[t]).float()
        error = rollout.rewards[t] + DISCOUNT * after * goes_on - rollout.values[t]
        gain = error + DISCOUNT * TRACE * goes_on * gain
        after = rollout.values[t]
        found.append(gain)
    return torch.stack(found[::-1])


def update(agent: Agent, optimizer: torch.optim.Optimizer, rollout: Rollout) -> None:
    """Improve the agent by PPO (Schulman et al. 2017); minibatches are whole rows, for the state's sake."""
    advantage = advantages(rollout)
    returns = advantage + rollout.values
    for _ in range(EPOCHS):
        for rows in torch.randperm(ENVIRONMENTS).chunk(MINIBATCHES):
            state = tuple(s[:, rows] for s in rollout.state)
            features = agent.sequence(rollout.observed[:, rows], state, rollout.resets[:, rows])
            choice = Categorical(logits=agent.policy(features))
            ratio = (choice.log_prob(rollout.actions[:, rows]) - rollout.log_probs[:, rows]).exp()
            gain = advantage[:, rows]
            gain = (gain - gain.mean()) / (gain.std() + 1e-8)
            of_policy = -torch.min(ratio * gain, ratio.clamp(1 - CLIP, 1 + CLIP) * gain).mean()
            of_value = (agent.value(features).squeeze(-1) - returns[:, rows]).square().mean()
            loss = of_policy + 0.5 * of_value - 0.01 * choice.entropy().mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(agent.parameters(), 0.5)
            optimizer.step()


def train(core: str, iterations: int, length: int, seed: int) -> tuple[list[float], float]:
    """Train an agent; return the share of right turns of each iteration, and the seconds of an update."""
    torch.manual_seed(seed)
    environments = Corridors(ENVIRONMENTS, length)
    agent = Agent(core)
    actor = Actor(agent, environments)
    optimizer = torch.optim.Adam(agent.parameters(), lr=1e-3)
    curve, seconds = [], []
    for iteration in range(iterations):
        rollout = actor.rollout()
        begin = time.perf_counter()
        update(agent, optimizer, rollout)
        seconds.append(time.perf_counter() - begin)
        curve.append((rollout.rewards[rollout.ended] > 0).float().mean().item())
        if (iteration + 1) % 10 == 0 or iteration + 1 == iterations:
            print(
                f"{type(agent.core).__name__}: iteration {iteration + 1}, {curve[-1]:.0%} of the turns right"
            )
    return curve, statistics.median(seconds)


def main() -> None:
    """Train with one core or with both, print the time of an update, and draw the learning curves."""
    parser = argparse.ArgumentParser(description="Recurrent PPO on a memory task.")
    parser.add_argument("--core", choices=["layernorm", "torch", "both"], default="layernorm")
    parser.add_argument("--iterations", type=int, default=60)
    parser.add_argument("--length", type=int, default=20, help="steps to the junction, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", metavar="FILE")
    options = parser.parse_args()
    cores = ["layernorm", "torch"] if options.core == "both" else [options.core]
    curves, seconds = {}, {}
    for core in cores:
        curves[core], seconds[core] = train(core, options.iterations, options.length, options.seed)
        print(f"{core}: an update takes {seconds[core] * 1e3:.1f} ms (median)")
    if len(cores) == 2:
        ratio = seconds["torch"] / seconds["layernorm"]
        print(f"with LayerNormLSTM and resets an update is {ratio:.1f} times as fast as with the loop")
    if options.plot:
        import matplotlib.pyplot as plt

        figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
        for core, curve in curves.items():
            label = "LayerNormLSTM, resets" if core == "layernorm" else "torch.nn.LSTM, step by step"
            axes.plot(
                range(1, len(curve) + 1), curve, label=f"{label}: {seconds[core] * 1e3:.0f} ms an update"
            )
        axes.set(xlabel="iteration", ylabel="turns that are right", ylim=(0.4, 1.02))
        axes.set_title(f"recurrent PPO: a cue shown {options.length // 2} to {options.length} steps before")
        axes.legend()
        figure.savefig(options.plot, dpi=150)


if __name__ == "__main__":
    main()

"""Online inference: a `LayerNormLSTM` fed one step at a time, as samples arrive, with microseconds a step.

Several channels of a signal are predicted one sample ahead. Now and then a channel is cut off and begins
anew. At the end the same samples are given to the network as one sequence: the predictions are the same,
bit for bit where the compiled kernels serve.

    python examples/streaming.py [--steps N] [--channels N] [--hidden H]
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import Tensor

from layernorm import LayerNormLSTM


def signal(step: int, channels: int) -> Tensor:
    """The samples (channels, 1) of one step: a sine of another frequency in each channel."""
    return torch.sin(0.1 * step * (1 + torch.arange(channels, dtype=torch.float32))).unsqueeze(-1)


def main() -> None:
    """Steps through the signal, tells how long a step takes, and compares with the whole sequence."""
    parser = argparse.ArgumentParser(description="A layer-normalized LSTM, one step at a time.")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--channels", type=int, default=1)
    parser.add_argument("--hidden", type=int, default=128)
    options = parser.parse_args()
    torch.manual_seed(0)
    lstm = LayerNormLSTM(1, options.hidden, num_layers=2)  # in real life: trained, its weights loaded
    stream = lstm.stream(batch_size=options.channels)
    samples, cuts, outputs, times = [], [], [], []
    for step in range(options.steps):
        sample, cut = signal(step, options.channels), torch.rand(options.channels) < 0.01
        if cut.any():
            stream.reset(cut)
        begin = time.perf_counter()
        outputs.append(stream.step(sample))
        times.append(time.perf_counter() - begin)
        samples.append(sample)
        cuts.append(cut)
    with torch.inference_mode():
        whole, _ = lstm(torch.stack(samples), resets=torch.stack(cuts))
    online = torch.stack(outputs)
    print(f"LayerNormLSTM, 2 layers of {options.hidden}, {options.channels} channels: {stream.kernel} kernel")
    print(f"a step takes {statistics.median(times) * 1e6:.1f} us (median of {options.steps})")
    print("same bits as the whole sequence:", torch.equal(online, whole))
    print(f"largest difference: {(online - whole).abs().max().item():.1e}")


if __name__ == "__main__":
    main()

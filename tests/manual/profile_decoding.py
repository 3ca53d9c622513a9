"""Show where the time of writing text goes: the first token, a step, its kernels.

    python tests/manual/profile_decoding.py                  # 124M with random weights
    python tests/manual/profile_decoding.py --texts=64 --no_cudnn

Needs a GPU. Each figure of the first token is printed for the first and for a second time: their
difference is what CUDA, cuBLAS and cuDNN set up once. --no_cudnn leaves cuDNN's attention out.
"""

import argparse
import sys
import time
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from torch.profiler import ProfilerActivity, profile

from gpt12.generate import Decoder, KVCache, RecordedStep, Sampling, start_copy, stream
from model import GPT, GPTConfig

PROMPT = 256
NEW = 500


def timed(name: str, work) -> None:
    """Print how long the host and the device need for a piece of work."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    torch.cuda.synchronize()
    print(f"  {name:28} {1e3 * (time.perf_counter() - began):8.1f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--texts", type=int, default=1)
    parser.add_argument("--no_cudnn", action="store_true")
    options = parser.parse_args()
    if options.no_cudnn:
        torch.backends.cuda.enable_cudnn_sdp(False)
    torch.set_grad_enabled(False)
    device = torch.device("cuda")
    with device:
        model = GPT(GPTConfig()).eval().bfloat16()
    prompts = torch.randint(50257, (options.texts, PROMPT)).tolist()
    sampling = Sampling(0.8, top_k=200)
    for turn in ("first time", "second time"):
        print(turn)
        draws = torch.rand(options.texts, NEW, device=device)
        decoder = Decoder(model, KVCache(options.texts, PROMPT + NEW, device), sampling, draws)
        step = RecordedStep(decoder.advance)
        timed("read prompts, choose token", partial(decoder.read_prompts, prompts))
        timed("copy the token to the host", start_copy(decoder.token))
        timed("step 1, as it is", step)
        timed("step 2, recorded and replayed", step)
        timed("step 3, replayed", step)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        decoder.advance()
        torch.cuda.synchronize()
    kernels = [event for event in profiled.events() if event.device_type.name == "CUDA"]
    print(f"kernels of a step: {len(kernels)} for 12 layers")
    averages = profiled.key_averages()
    print(averages.table(sort_by="self_device_time_total", row_limit=25, max_name_column_width=80))
    arrivals = []
    for _ in stream(model, prompts, NEW, sampling):
        arrivals.append(time.perf_counter())
    step_s = median(after - before for before, after in pairwise(arrivals))
    whole_s = arrivals[-1] - arrivals[0]
    print(f"{options.texts / step_s:,.0f} tokens/s by the median step")
    print(f"{options.texts * (NEW - 1) / whole_s:,.0f} tokens/s from the first token to the last")


if __name__ == "__main__":
    main()

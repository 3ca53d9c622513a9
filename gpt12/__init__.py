"""What the scripts are built from: one technique or concern per file.

The model     loss.py           output head and cross-entropy in chunks, its Triton kernel
              recompute.py      computing activations again to save memory
              twin.py           whether model.py is GPT-2, and a fingerprint of it
              lora.py           low-rank adapters       weights.py   Hugging Face folders, ckpt.pt
              generate.py       choosing tokens, key/value cache, decoding loop

A run         settings.py       every key, its default and its description
              config.py         defaults, then config files, then --key=value; --help
              run.py            what a run starts from, everything resolved
              device.py         what "auto" becomes, CUDA graphs  memory.py  bytes of a step
              distributed.py    several processes, Ctrl-C

The step      optimizer.py      the optimizers that --optimizer can name
              muon.py           Muon
              fit.py            settings with which a step fits into the memory

The folder    folder.py         run.json, the lock, an earlier run
              checkpoint.py     best/ and last/, what resuming needs, and when they are saved
              introduction.py   what a run says first
              log.py            terminal, metrics.jsonl, loss.png, wandb, clock

bench.py      measure.py        times steps and texts     cards.py   datasheets

Everywhere    errors.py (a user's mistakes), files.py (atomic writes)
"""

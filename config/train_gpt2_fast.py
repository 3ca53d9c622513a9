# GPT-2 124M from scratch, the cheapest way to that loss
#
#   python data/fineweb_edu/prepare.py
#   python train.py config/train_gpt2_fast.py
#
# Result  the loss of train_gpt2_12gb.py with 1.5 times fewer tokens (predicted: 1.88 times in compare_optimizers.py)
# Time    1.3 days on a 4070 Ti at 60,000 tokens/s (predicted)
# VRAM    7.2 GiB of 12 GB (predicted); out of memory: halve batch_size and double gradient_accumulation_steps

out_dir = "out-gpt2-fast"
eval_interval = 500
eval_iters = 100
log_interval = 10

dataset = "fineweb_edu"
batch_size = 16
block_size = 1024
gradient_accumulation_steps = 30

optimizer = "muon"  # for the blocks' matrices
schedule = "wsd"  # level, then straight down: a run can be prolonged from before its descent
learning_rate = 4e-3  # the best of five from 1e-3 to 8e-3 in compare_optimizers.py, at an eighth of this step
beta1 = 0.95
min_lr = 0.0
warmup_iters = 250
max_iters = 13500
decay_fraction = 0.4
weight_decay = 1e-1

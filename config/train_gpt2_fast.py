# Train GPT-2 124M from scratch with Muon, in fewer tokens
#
#   python data/fineweb_edu/prepare.py
#   python train.py config/train_gpt2_fast.py
#
# Result  the loss of train_gpt2_12gb.py after 1.5 times fewer tokens (predicted)
# Time    1.3 days on a 4070 Ti (predicted)
# VRAM    7.2 GiB (predicted)
#
# Out of memory? Halve batch_size and double gradient_accumulation_steps: the step stays the same.

out_dir = "out-gpt2-fast"
eval_interval = 500
eval_iters = 100
log_interval = 10

dataset = "fineweb_edu"
# 16 sequences x 1,024 tokens x 30 micro-batches = 491,520 tokens a step
batch_size = 16
block_size = 1024
gradient_accumulation_steps = 30

optimizer = "muon"  # for the matrices of the blocks; AdamW updates the rest
schedule = "wsd"  # a run can be made longer from a checkpoint before the rate falls
learning_rate = 4e-3  # the best of five in compare_optimizers.py, whose step has fewer tokens
beta1 = 0.95
min_lr = 0.0
warmup_iters = 250
max_iters = 13500
decay_fraction = 0.4
weight_decay = 1e-1

# Train GPT-2 124M from scratch on one 12 GB card
#
#   python data/fineweb_edu/prepare.py
#   python train.py config/train_gpt2_12gb.py
#
# Result  validation loss about 3.1 after 9.8 billion tokens (predicted)
# Time    1.8 days on a 4070 Ti (predicted)
# VRAM    7.2 GiB (predicted)
#
# Out of memory? Halve batch_size and double gradient_accumulation_steps: the step stays the same.

out_dir = "out-gpt2-12gb"
eval_interval = 500
eval_iters = 100
log_interval = 10

dataset = "fineweb_edu"
# 16 sequences x 1,024 tokens x 30 micro-batches = 491,520 tokens a step, as in train_gpt2.py
batch_size = 16
block_size = 1024
gradient_accumulation_steps = 30

learning_rate = 6e-4
min_lr = 6e-5
warmup_iters = 700  # shorter than nanoGPT's 2,000, because the run is shorter
max_iters = 20000
weight_decay = 1e-1

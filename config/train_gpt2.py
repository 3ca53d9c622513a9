# Train GPT-2 124M from scratch with nanoGPT's settings
#
#   torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py
#
# Result  validation loss about 2.85 after 295 billion tokens (nanoGPT's figure)
# Time    4 days on 8 A100 (nanoGPT's figure); 54 days on one 4070 Ti (predicted)
# VRAM    6.1 GiB (predicted)

out_dir = "out-gpt2"
eval_interval = 1000
eval_iters = 200
log_interval = 10

wandb_project = "owt"
wandb_run_name = "gpt2-124M"

dataset = "openwebtext"
# 12 sequences x 1,024 tokens x 40 micro-batches over all GPUs = 491,520 tokens a step
batch_size = 12
block_size = 1024
gradient_accumulation_steps = 5 * 8

max_iters = 600000
lr_decay_iters = 600000
weight_decay = 1e-1

# GPT-2 XL (1.5B) on Shakespeare, nanoGPT's settings, in 12 GB
#
#   pip install torchao
#   python train.py config/finetune_shakespeare.py
#
# Result  not measured yet
# Time    5,700 tokens/s on an H200; 17,700 at micro-batch 4 (--batch_size=4 --gradient_accumulation_steps=8)
# VRAM    9.9 GiB at most in a run held to 11 GiB, with recompute=block, which it chooses
#
# nanoGPT's AdamW in float32 wants 25 GB for 1.5 billion weights: 8 bits a moment and bfloat16 weights fit into 12.
# Without torchao: --optimizer=adamw --init_from=gpt2-medium.

import time

out_dir = "out-shakespeare"
eval_interval = 5
eval_iters = 40
always_save_checkpoint = False  # only the best; the text is short and soon known by heart

wandb_project = "shakespeare"
wandb_run_name = "ft-" + str(time.time())

dataset = "shakespeare"
init_from = "gpt2-xl"

# 1 row x 1,024 tokens x 32 micro-batches = 32,768 tokens a step; 9.2 steps are an epoch
batch_size = 1
gradient_accumulation_steps = 32
max_iters = 20

optimizer = "adamw8bit"
learning_rate = 3e-5
decay_lr = False

# AdamW against Muon: GPT-2 124M, 98 million tokens
#
#   python train.py config/compare_optimizers.py
#   python train.py config/compare_optimizers.py --optimizer=muon --learning_rate=4e-3 --beta1=0.95 \
#       --max_iters=1000 --warmup_iters=100
#
# Result  83 million tokens of Debian's documentation: AdamW 2.708 after 1,500 steps, Muon 2.570 after 1,000 (README)
# Time    181 s and 125 s of training on one H200
# VRAM    11.4 GiB; on a 12 GB card --batch_size=16 --gradient_accumulation_steps=4 makes the same step
out_dir = "out-compare"
dataset = "fineweb_edu"
eval_interval = 250
eval_iters = 32
log_interval = 50
always_save_checkpoint = False
# 32 rows x 1,024 tokens x 2 micro-batches = 65,536 tokens a step
batch_size = 32
block_size = 1024
gradient_accumulation_steps = 2
max_iters = 1500
# A tenth of the steps up, then straight down to 0: what suits AdamW best at a given number of steps.
schedule = "wsd"
decay_fraction = 1.0
warmup_iters = 150
min_lr = 0.0
learning_rate = 1e-3
weight_decay = 0.1

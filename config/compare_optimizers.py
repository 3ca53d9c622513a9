# Compare AdamW with Muon: GPT-2 124M, 49 million tokens
#
#   python data/fineweb_edu/prepare.py
#   python train.py config/compare_optimizers.py
#   python train.py config/compare_optimizers.py --out_dir=out-compare-muon --optimizer=muon \
#       --learning_rate=4e-3 --beta2=0.98
#   python train.py config/compare_optimizers.py --out_dir=out-compare-fast --optimizer=muon \
#       --learning_rate=4e-3 --beta2=0.98 --short_context_share=0.5
#
# Result  loss 2.738 with AdamW on other data: Debian's documentation (76M tokens)
# Time    95 s of training with AdamW, measured on an H100
# VRAM    11.4 GiB, measured on an H200
#
# python -m tests.manual.race compares the last one with nanoGPT's recipe instead, on any data set.
# On a 12 GB card add --batch_size=16 --gradient_accumulation_steps=2, which makes the same step.

out_dir = "out-compare"
dataset = "fineweb_edu"
eval_interval = 250
eval_iters = 85
log_interval = 50
always_save_checkpoint = False  # only the losses matter here

# 32 sequences x 1,024 tokens x 1 micro-batch = 32,768 tokens a step
batch_size = 32
block_size = 1024
gradient_accumulation_steps = 1
max_iters = 1500

# The rate rises for a tenth of the steps and then falls in a straight line to 0. For AdamW
# this is the best schedule if the number of steps is fixed beforehand.
schedule = "wsd"
decay_fraction = 1.0
warmup_iters = 150
min_lr = 0.0
learning_rate = 1e-3
weight_decay = 0.1

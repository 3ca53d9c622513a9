# Compare AdamW with Muon: GPT-2 124M, 98 million tokens
#
#   python data/fineweb_edu/prepare.py
#   python train.py config/compare_optimizers.py
#   python train.py config/compare_optimizers.py --out_dir=out-compare-muon --optimizer=muon \
#       --learning_rate=4e-3 --beta1=0.95 --max_iters=1000 --warmup_iters=100
#
# Result  validation loss 2.708 (AdamW) and 2.570 (Muon) on Debian's documentation
# Time    181 s (AdamW) and 125 s (Muon) of training, measured on an H200
# VRAM    11.4 GiB, measured on an H200
#
# The result is for another data set than fineweb_edu: 83 million tokens of Debian's documentation.
# Both take 65,536 tokens a step here. Muon with half of that, and shorter rows first, needs less
# time: python -m tests.manual.race compares that with nanoGPT's recipe.
# On a 12 GB card add --batch_size=16 --gradient_accumulation_steps=4, which makes the same step.

out_dir = "out-compare"
dataset = "fineweb_edu"
eval_interval = 250
eval_iters = 32
log_interval = 50
always_save_checkpoint = False  # only the losses matter here

# 32 sequences x 1,024 tokens x 2 micro-batches = 65,536 tokens a step
batch_size = 32
block_size = 1024
gradient_accumulation_steps = 2
max_iters = 1500

# The rate rises for a tenth of the steps and then falls in a straight line to 0. This suits AdamW
# best if the number of steps is given.
schedule = "wsd"
decay_fraction = 1.0
warmup_iters = 150
min_lr = 0.0
learning_rate = 1e-3
weight_decay = 0.1

# Train GPT-2 124M from scratch with Muon, in fewer tokens
#
#   python data/fineweb_edu/prepare.py
#   python train.py config/train_gpt2_fast.py
#
# Result  the loss of train_gpt2_12gb.py with two thirds of its tokens (predicted)
# Time    1.2 days on a 4070 Ti (predicted)
# VRAM    7.2 GiB (predicted)
#
# Out of memory? Halve batch_size and double gradient_accumulation_steps: the step stays the same.
#
# A shorter run: keep the learning rate, and let the tokens of a step shrink about as the square
# root of the run's tokens: 491,520 for this run's 6.6 billion, 32,768 for 50 million, 16,384 (16
# sequences) for 14 million. The last two were measured (docs/results.md). In a short run, let the
# warm-up take a tenth of the steps.

out_dir = "out-gpt2-fast"
eval_interval = 500
eval_iters = 100
log_interval = 10

dataset = "fineweb_edu"
# 16 sequences x 1,024 tokens x 30 micro-batches = 491,520 tokens a step
batch_size = 16
block_size = 1024
gradient_accumulation_steps = 30
max_iters = 13500

optimizer = "muon"  # for the matrices of the blocks; AdamW updates the rest
learning_rate = 4e-3  # for both; the best with steps of 16,384 and of 65,536 tokens
beta1 = 0.9  # Muon's momentum and AdamW's
beta2 = 0.98  # a lower one was worse
weight_decay = 0.1
short_context_share = 0.5  # a model learns from near words first, and attention costs less

schedule = "wsd"  # with decay_fraction 1, the rate falls in a straight line to 0
decay_fraction = 1.0
warmup_iters = 500
min_lr = 0.0

# GPT-2 large (774M) on your own text, all weights, in 12 GB
#
#   pip install torchao
#   python train.py config/finetune_gpt2_large.py --dataset=my.txt
#   python sample.py --out_dir=out-finetune-gpt2-large
#
# Result  on Shakespeare, which it takes without --dataset: not measured yet
# Time    39,200 tokens/s on an H200; 63,600 at 32 rows (--batch_size=32 --gradient_accumulation_steps=1)
# VRAM    8.7 GiB at most in a run held to 11 GiB

out_dir = "out-finetune-gpt2-large"
init_from = "gpt2-large"
dataset = "shakespeare"  # yours: --dataset=my.txt, a .csv, a .jsonl, a folder of them, or hf:owner/name

eval_interval = 20
eval_iters = 0  # the whole validation split
log_interval = 1
always_save_checkpoint = False  # best/ is what you want; last/ is written every ten minutes all the same
patience = 5

# 4 rows x 1,024 tokens x 4 micro-batches = 16,384 tokens a step
batch_size = 4
gradient_accumulation_steps = 4
block_size = 1024
num_epochs = 3.0
dropout = 0.1

optimizer = "adamw8bit"  # AdamW in float32 alone would take all 12 GB
learning_rate = 2e-5
min_lr = 2e-6
warmup_iters = 10
weight_decay = 0.1

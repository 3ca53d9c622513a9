# GPT-2 medium (350M) on your own text, all weights, in 12 GB
#
#   python train.py config/finetune_gpt2_medium.py --dataset=my.txt
#   python sample.py --out_dir=out-finetune-gpt2-medium
#
# Result  on Shakespeare, which it takes without --dataset: not measured yet
# Time    55 steps on Shakespeare: 154,000 tokens/s on an H200, 45 s on a 4070 Ti (predicted)
# VRAM    9.9 GiB at most in a run held to 11 GiB

out_dir = "out-finetune-gpt2-medium"
init_from = "gpt2-medium"
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

learning_rate = 3e-5
min_lr = 3e-6
warmup_iters = 10
weight_decay = 0.1

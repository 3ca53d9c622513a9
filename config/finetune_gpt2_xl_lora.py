# GPT-2 XL (1.5B) on your own text, by LoRA, in 12 GB
#
#   python train.py config/finetune_gpt2_xl_lora.py --dataset=my.txt
#   python sample.py --out_dir=out-finetune-gpt2-xl-lora
#
# Result  on Shakespeare, which it takes without --dataset: not measured yet
# Time    41,000 tokens/s on an H200
# VRAM    9.6 GiB at most in a run held to 11 GiB

out_dir = "out-finetune-gpt2-xl-lora"
init_from = "gpt2-xl"
dataset = "shakespeare"  # yours: --dataset=my.txt, a .csv, a .jsonl, a folder of them, or hf:owner/name

eval_interval = 20
eval_iters = 0  # the whole validation split
log_interval = 1
always_save_checkpoint = False  # best/ is what you want; last/ is written every ten minutes all the same
patience = 5

# 2 rows x 1,024 tokens x 8 micro-batches = 16,384 tokens a step
batch_size = 2
gradient_accumulation_steps = 8
block_size = 1024
num_epochs = 3.0
dropout = 0.0

lora_rank = 16
lora_dropout = 0.05
learning_rate = 2e-4
min_lr = 2e-5
warmup_iters = 10
weight_decay = 0.1

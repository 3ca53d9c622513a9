# GPT-2 124M on your own questions and answers, in 12 GB
#
#   python train.py config/finetune_instruct.py --dataset=my.jsonl
#   python sample.py --out_dir=out-finetune-instruct --interactive
#
# Result  depends on your examples
# Time    as finetune_gpt2.py
# VRAM    7.2 GiB at most in a run held to 11 GiB
#
# One example a line: {"prompt": "...", "completion": "..."}, taken word for word, or
# {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}.
# Only the answers are trained.

out_dir = "out-finetune-instruct"
init_from = "gpt2"
dataset = "my.jsonl"

eval_interval = 50
eval_iters = 0  # the whole validation split
log_interval = 1
always_save_checkpoint = False
patience = 3
val_fraction = 0.05

# 16 rows x 1,024 tokens; a row holds as many whole examples as fit
batch_size = 16
gradient_accumulation_steps = 1
block_size = 1024
num_epochs = 3.0
dropout = 0.1

learning_rate = 5e-5
min_lr = 0.0
warmup_iters = 20
weight_decay = 0.01

# Fine-tune GPT-2 124M on your questions and answers, in 12 GB
#
#   python train.py config/finetune_instruct.py --dataset=my.jsonl
#   python sample.py --out_dir=out-finetune-instruct --interactive
#
# Result  on a small base, 300 questions: validation loss 4.05 to 3.57 (docs/results.md)
# Time    as config/finetune_gpt2.py
# VRAM    2.3 GiB, as config/finetune_gpt2.py
#
# Each line of my.jsonl is one example, all in the same form. Only the answers are trained on.
# Two texts, used word for word: {"prompt": "...", "completion": "..."}
# A conversation: {"messages": [{"role": "user", "content": "..."},
#                               {"role": "assistant", "content": "..."}]}

out_dir = "out-finetune-instruct"
init_from = "gpt2"
dataset = "my.jsonl"

eval_interval = 100
log_interval = 10
always_save_checkpoint = False  # you use best/; last/ is still written from time to time
patience = 5  # stop once the model overfits
val_fraction = 0.05  # examples are few, so most of them are for training

# 1 sequence of 1,024 tokens a step; it holds as many whole examples as fit. Each is trained as if
# it were alone: it sees no other, and its positions count from its own start.
batch_size = 1
gradient_accumulation_steps = 1
block_size = 1024
num_epochs = 6.0
dropout = 0.1

learning_rate = 1e-4
min_lr = 0.0
warmup_iters = 0
weight_decay = 0.01

# Fine-tune GPT-2 124M on your text, all weights, in 12 GB
#
#   python train.py config/finetune_gpt2.py --dataset=my.txt
#   python sample.py --out_dir=out-finetune-gpt2
#
# Result  on a small base, 100 kB of Shakespeare: validation loss 6.20 to 4.40 (docs/results.md)
# Time    174,000 tokens/s, measured on an H200; 30,000 on a 4070 Ti (predicted)
# VRAM    2.3 GiB, measured on an H200 limited to 11 GiB

out_dir = "out-finetune-gpt2"
init_from = "gpt2"
dataset = "shakespeare"  # used if you give no --dataset=my.txt

eval_interval = 250
log_interval = 10
always_save_checkpoint = False  # you use best/; last/ is still written from time to time
patience = 4  # stop once the model overfits: 1,000 steps without a better loss

# 1 sequence of 1,024 tokens a step: a short text, too, makes many steps
batch_size = 1
gradient_accumulation_steps = 1
block_size = 1024
num_epochs = 12.0  # at most: patience ends it
dropout = 0.1  # a small text is soon learned by heart

learning_rate = 1e-4  # low, so that GPT-2 keeps what it knows
min_lr = 0.0
warmup_iters = 0
weight_decay = 0.1

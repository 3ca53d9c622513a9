# Fine-tune GPT-2 350M on your text, all weights, in 12 GB
#
#   python train.py config/finetune_gpt2_medium.py --dataset=my.txt
#   python sample.py --out_dir=out-finetune-gpt2-medium
#
# Result  depends on your text; not measured yet
# Time    75,900 tokens/s, measured on an H200; 11,000 on a 4070 Ti (predicted)
# VRAM    5.8 GiB, measured on an H200 limited to 11 GiB

out_dir = "out-finetune-gpt2-medium"
init_from = "gpt2-medium"
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
dropout = 0.1

learning_rate = 5e-5  # larger models take smaller rates
min_lr = 0.0
warmup_iters = 0
weight_decay = 0.1

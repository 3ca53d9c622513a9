# Fine-tune GPT-2 1.5B on your text with LoRA, in 12 GB
#
#   python train.py config/finetune_gpt2_xl_lora.py --dataset=my.txt
#   python sample.py --out_dir=out-finetune-gpt2-xl-lora
#
# Result  depends on your text; not measured yet
# Time    37,900 tokens/s, measured on an H200; not measured on a 4070 Ti
# VRAM    5.7 GiB, measured on an H200 limited to 11 GiB

out_dir = "out-finetune-gpt2-xl-lora"
init_from = "gpt2-xl"
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

lora_rank = 16
learning_rate = 2e-4  # adapters start at zero and take larger rates than weights
min_lr = 0.0
warmup_iters = 0
weight_decay = 0.1

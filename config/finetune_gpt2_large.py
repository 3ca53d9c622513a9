# Fine-tune GPT-2 774M on your text, all weights, in 12 GB
#
#   pip install torchao
#   python train.py config/finetune_gpt2_large.py --dataset=my.txt
#   python sample.py --out_dir=out-finetune-gpt2-large
#
# Result  depends on your text; on Shakespeare (without --dataset) not measured yet
# Time    39,200 tokens/s, measured on an H200; not measured on a 4070 Ti
# VRAM    8.7 GiB, measured on an H200 limited to 11 GiB
#
# With --batch_size=32 --gradient_accumulation_steps=1 the H200 made 63,600 tokens/s.

out_dir = "out-finetune-gpt2-large"
init_from = "gpt2-large"
dataset = "shakespeare"  # used if you give no --dataset=my.txt

eval_interval = 20
eval_iters = 0  # measure on the whole validation split
log_interval = 1
always_save_checkpoint = False  # you use best/; last/ is still written from time to time
patience = 5  # stop once the model overfits

# 4 sequences x 1,024 tokens x 4 micro-batches = 16,384 tokens a step
batch_size = 4
gradient_accumulation_steps = 4
block_size = 1024
num_epochs = 3.0
dropout = 0.1

optimizer = "adamw8bit"  # weights, gradients and AdamW's state in float32 would take 12 GB
learning_rate = 2e-5  # larger models take smaller rates
min_lr = 2e-6
warmup_iters = 10
weight_decay = 0.1

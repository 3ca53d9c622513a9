# Fine-tune GPT-2 350M on your text, all weights, in 12 GB
#
#   python train.py config/finetune_gpt2_medium.py --dataset=my.txt
#   python sample.py --out_dir=out-finetune-gpt2-medium
#
# Result  depends on your text; on Shakespeare (without --dataset) not measured yet
# Time    3 epochs of Shakespeare: 154,000 tokens/s on an H200; 46 s on a 4070 Ti (predicted)
# VRAM    9.9 GiB, measured on an H200 limited to 11 GiB

out_dir = "out-finetune-gpt2-medium"
init_from = "gpt2-medium"
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

learning_rate = 3e-5  # larger models take smaller rates
min_lr = 3e-6
warmup_iters = 10
weight_decay = 0.1

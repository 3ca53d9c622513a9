# Fine-tune GPT-2 1.5B on Shakespeare as nanoGPT does, in 12 GB
#
#   pip install torchao
#   python train.py config/finetune_shakespeare.py
#
# Result  not measured yet
# Time    5,700 tokens/s, measured on an H200; not measured on a 4070 Ti
# VRAM    9.9 GiB, measured on an H200 limited to 11 GiB
#
# nanoGPT's AdamW in float32 needs 25 GB for this model. adamw8bit and bfloat16 weights fit into 12.
# Without torchao: --optimizer=adamw --init_from=gpt2-medium.
# With --batch_size=4 --gradient_accumulation_steps=8 the H200 made 17,700 tokens/s.

import time

out_dir = "out-shakespeare"
eval_interval = 5
eval_iters = 40
always_save_checkpoint = False  # only best/ is useful: the model soon knows the text by heart

wandb_project = "shakespeare"
wandb_run_name = "ft-" + str(time.time())

dataset = "shakespeare"
init_from = "gpt2-xl"

# 1 sequence x 1,024 tokens x 32 micro-batches = 32,768 tokens a step; an epoch is 9.2 steps
batch_size = 1
gradient_accumulation_steps = 32
max_iters = 20

optimizer = "adamw8bit"  # the only way to train all weights of this model in 12 GB
learning_rate = 3e-5
decay_lr = False

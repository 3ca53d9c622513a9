# Shakespeare by characters, 10.7M: the first run on a GPU
#
#   python train.py config/train_shakespeare_char.py
#   python sample.py --out_dir=out-shakespeare-char
#
# Result  validation loss 1.4697 or lower (nanoGPT's: 1.4697), then it overfits; TODO(measure)
# Time    TODO(measure)
# VRAM    TODO(measure)

out_dir = "out-shakespeare-char"
eval_interval = 250  # it overfits, so look often
eval_iters = 200
log_interval = 10
always_save_checkpoint = False

wandb_project = "shakespeare-char"
wandb_run_name = "mini-gpt"

dataset = "shakespeare_char"
gradient_accumulation_steps = 1
batch_size = 64
block_size = 256  # characters of context

n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2

learning_rate = 1e-3  # a small network can take a high one
max_iters = 5000
lr_decay_iters = 5000
min_lr = 1e-4
beta2 = 0.99  # few tokens a step, so average over more steps
warmup_iters = 100

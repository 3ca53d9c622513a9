# Shakespeare by characters, 10.7M: the first run on a GPU
#
#   python train.py config/train_shakespeare_char.py
#   python sample.py --out_dir=out-shakespeare-char
#
# Result  validation loss 1.45 over the whole split, tiny Shakespeare (nanoGPT: 1.4697)
# Time    12 to 17 s on an H200, imports included (measured)
# VRAM    1.4 GiB (predicted)

out_dir = "out-shakespeare-char"
eval_interval = 250
eval_iters = 0  # the whole split
log_interval = 50
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

# Short and hot: Muon for the matrices takes half of AdamW's steps to the same loss here, and the linear decay to 0 over
# most of the run does the rest. More steps overfit.
optimizer = "muon"
learning_rate = 7e-3
weight_decay = 0.3
beta1 = 0.9  # Muon's momentum, too
beta2 = 0.99  # few tokens a step, so average over more steps
schedule = "wsd"
decay_fraction = 0.6
min_lr = 0.0
warmup_iters = 100
max_iters = 750

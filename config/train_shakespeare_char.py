# First run on a GPU: 10.7M, Shakespeare by characters
#
#   python train.py config/train_shakespeare_char.py
#   python sample.py --out_dir=out-shakespeare-char
#
# Result  validation loss 1.45 over the whole split (nanoGPT: 1.4697)
# Time    15 to 29 s with imports, 4 of them training, measured on an H200
# VRAM    1.4 GiB (predicted)

out_dir = "out-shakespeare-char"
eval_interval = 250
eval_iters = 0  # measure on the whole validation split
log_interval = 50
always_save_checkpoint = False  # you use best/: the last model overfits

wandb_project = "shakespeare-char"
wandb_run_name = "mini-gpt"

dataset = "shakespeare_char"
gradient_accumulation_steps = 1
batch_size = 64
block_size = 256  # characters of context

n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.1  # the text is small and would soon be learned by heart

# Few steps at a high rate: Muon needs half as many steps as AdamW here. More steps overfit.
optimizer = "muon"
learning_rate = 7e-3
weight_decay = 0.3
beta1 = 0.9  # also Muon's momentum
beta2 = 0.99  # a step has few tokens, so the mean goes over more steps
schedule = "wsd"
decay_fraction = 0.6  # the rate falls over most of the run
min_lr = 0.0
warmup_iters = 100
max_iters = 500

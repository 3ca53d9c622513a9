# First run on a CPU: 0.2M, Shakespeare by characters
#
#   python train.py config/train_shakespeare_cpu.py
#   python sample.py --out_dir=out-shakespeare-cpu
#
# Result  validation loss 1.8 over the whole split
# Time    17 to 41 s with imports, measured on 2 CPU cores
# VRAM    none

out_dir = "out-shakespeare-cpu"
eval_interval = 300
eval_iters = 0  # measure on the whole validation split
log_interval = 25
always_save_checkpoint = False  # you use best/

dataset = "shakespeare_char"
gradient_accumulation_steps = 1
batch_size = 16
block_size = 64

n_layer = 2
n_head = 4
n_embd = 80
dropout = 0.0  # the model is too small to overfit in this time
dtype = "float32"  # in a model this narrow, converting to bfloat16 costs more than it saves

# Few steps at a high rate, as in train_shakespeare_char.py.
optimizer = "muon"
learning_rate = 2e-2
beta1 = 0.9  # also Muon's momentum
beta2 = 0.99  # a step has few tokens, so the mean goes over more steps
schedule = "wsd"
decay_fraction = 1.0  # the rate falls from the end of the warm-up on
min_lr = 0.0
warmup_iters = 30
max_iters = 600

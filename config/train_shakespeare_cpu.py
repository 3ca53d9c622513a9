# Shakespeare by characters, 0.4M: the first run on a CPU
#
#   python train.py config/train_shakespeare_cpu.py
#   python sample.py --out_dir=out-shakespeare-cpu
#
# Result  validation loss 1.8 over the whole split, tiny Shakespeare
# Time    29 s on 2 cores, imports included (measured)
# VRAM    none needed

out_dir = "out-shakespeare-cpu"
eval_interval = 225
eval_iters = 0  # the whole split
log_interval = 25
always_save_checkpoint = False

dataset = "shakespeare_char"
gradient_accumulation_steps = 1
batch_size = 16
block_size = 64

n_layer = 2
n_head = 4
n_embd = 128
dropout = 0.0  # too small to overfit in this time
dtype = "float32"  # at this width bf16 products save less than their casts cost

# Short and hot, as on the GPU.
optimizer = "muon"
learning_rate = 2e-2
beta1 = 0.9
beta2 = 0.99
schedule = "wsd"
decay_fraction = 1.0  # falling from the end of the warm-up on
min_lr = 0.0
warmup_iters = 30
max_iters = 450

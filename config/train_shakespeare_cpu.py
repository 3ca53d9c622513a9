# Shakespeare by characters, 0.8M: the first run on a CPU
#
#   python train.py config/train_shakespeare_cpu.py
#   python sample.py --out_dir=out-shakespeare-cpu
#
# Result  validation loss 1.89 or lower over the whole split; TODO(measure)
# Time    TODO(measure)
# VRAM    none needed

out_dir = "out-shakespeare-cpu"
eval_interval = 250
eval_iters = 0  # the whole split
log_interval = 10
always_save_checkpoint = False

dataset = "shakespeare_char"
gradient_accumulation_steps = 1
batch_size = 12
block_size = 64

n_layer = 4
n_head = 4
n_embd = 128
dropout = 0.0  # too small to overfit in this time

learning_rate = 1e-3
max_iters = 2000
min_lr = 1e-4
beta2 = 0.99
warmup_iters = 100

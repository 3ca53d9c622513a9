# Measure loss and perplexity of OpenAI's gpt2 (124M)
#
#   python train.py config/eval_gpt2.py
#   python train.py config/eval_gpt2.py --dataset=my.txt
#
# Result  validation loss about 3.11 on OpenWebText (nanoGPT's figure)
# Time    not measured yet
# VRAM    2 GiB (predicted)

batch_size = 8
eval_iters = 500  # many batches, so that chance changes the loss little
eval_only = True
init_from = "gpt2"

# Measure loss and perplexity of OpenAI's gpt2-large (774M)
#
#   python train.py config/eval_gpt2_large.py
#   python train.py config/eval_gpt2_large.py --dataset=my.txt
#
# Result  validation loss about 2.67 on OpenWebText (nanoGPT's figure)
# Time    not measured yet
# VRAM    5 GiB (predicted)

batch_size = 8
eval_iters = 500  # many batches, so that chance changes the loss little
eval_only = True
init_from = "gpt2-large"

# Measure loss and perplexity of OpenAI's gpt2-medium (350M)
#
#   python train.py config/eval_gpt2_medium.py
#   python train.py config/eval_gpt2_medium.py --dataset=my.txt
#
# Result  validation loss about 2.84 on OpenWebText (nanoGPT's figure)
# Time    not measured yet
# VRAM    3 GiB (predicted)

batch_size = 8
eval_iters = 500  # many batches, so that chance changes the loss little
eval_only = True
init_from = "gpt2-medium"

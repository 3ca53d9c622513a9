# Measure loss and perplexity of OpenAI's gpt2-xl (1.5B)
#
#   python train.py config/eval_gpt2_xl.py
#   python train.py config/eval_gpt2_xl.py --dataset=my.txt
#
# Result  validation loss about 2.54 on OpenWebText (nanoGPT's figure)
# Time    not measured yet
# VRAM    8 GiB (predicted)

batch_size = 8
eval_iters = 500  # many batches, so that chance changes the loss little
eval_only = True
init_from = "gpt2-xl"

# Loss and perplexity of OpenAI's gpt2 (124M)
#
#   python train.py config/eval_gpt2.py
#   python train.py config/eval_gpt2.py --dataset=my.txt
#
# Result  validation loss about 3.11 on OpenWebText (nanoGPT's figure)
# Time    TODO(measure), once the data set is there
# VRAM    TODO(measure)

batch_size = 8
eval_iters = 500  # many, for a good estimate
eval_only = True
init_from = "gpt2"

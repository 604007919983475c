# The embedded digits, on the CPU of a laptop.
#   python data/digits/make.py
#   python prepare.py data/digits/embeddings.pkl --out=data/digits --overwrite=True
#   python train.py config/train_digits.py --overwrite=True
# Expect a validation loss of about 0.21 after two minutes on two cores.
out_dir = "out-digits"
data_dir = "data/digits"
eval_interval = 250
eval_samples = 32
save_interval = 500
batch_size = 4
gradient_accumulation_steps = 2  # so that one process or two do the same work
dim = 128
n_layer = 2
n_head = 4
multiple_of = 32
max_iters = 2500
learning_rate = 1e-2
warmup_iters = 125
weight_decay = 0.01
ema_decay = 0.99
compile = False  # so small a model waits for the CPU, on a GPU too

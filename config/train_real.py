# Real features, (64, 1280) -> (64, 768), 720 training samples: a model that two CPU cores train in minutes.
#   python prepare.py SHARDS --out=data/real
#   python train.py config/train_real.py
#   python sample.py --out_dir=out-real
# Expect, of 800 photographs, a validation loss of about 1.32 in some two minutes on two cores, and samples of token
# cosine 0.20. So few samples are soon learned by heart (their std ratio is 1.08): with more, train longer.
out_dir = "out-real"
data_dir = "data/real"
eval_interval = 100
eval_samples = 32
save_interval = 100
batch_size = 4
gradient_accumulation_steps = 2
dim = 256
n_layer = 2
n_head = 4
max_iters = 1000
learning_rate = 4e-3
warmup_iters = 50
weight_decay = 0.01
ema_decay = 0.99
